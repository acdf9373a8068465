"""What the peers of the suite `quant` share: lines of JSON in, lines of JSON out, timings of prepared calls."""

import gc
import json
import sys
import time
from collections.abc import Callable


class Skip(Exception):
    """Why a case cannot be measured here."""


def serve(
    versions: dict, threads: int, prepare: Callable[[dict], Callable[[int], object]], release=lambda: None
) -> None:
    """Answers until the input ends. `prepare` makes a call of a case; the call gets the number of the turn, to go round
    copies of its weights with."""
    gc.disable()
    calls: list[Callable[[int], object] | None] = []
    turns: list[int] = []
    print(json.dumps({**versions, "threads": threads}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "drop":
            calls = [None] * len(calls)
            release()
            gc.collect()
            answer = {}
        elif request["do"] == "prepare":
            try:
                calls.append(prepare(request["case"]))
                turns.append(0)
                answer = {"handle": len(calls) - 1}
            except Skip as reason:
                answer = {"skip": str(reason)}
        else:
            handle = request["handle"]
            call, turn = calls[handle], turns[handle]
            seconds = []
            # What a call through ctypes costs by itself is ours to take off: see `overhead` of the call.
            overhead = getattr(call, "overhead", 0.0)
            for index in range(request["warm_up"] + request["calls"]):
                before = time.process_time_ns()
                start = time.perf_counter_ns()
                call(turn + index)
                took = time.perf_counter_ns() - start
                # Other programs interrupt a long call, however often it is repeated: on one thread, what counts of it
                # is the processor's time. Ours is timed in the same way.
                if threads == 1 and took > 1_000_000:
                    took = time.process_time_ns() - before
                if index >= request["warm_up"]:
                    seconds.append(max(took * 1e-9 - overhead, 1e-9))
            turns[handle] = turn + len(seconds) + request["warm_up"]
            answer = {"seconds": seconds}
        print(json.dumps(answer), flush=True)


class Bare:
    """A call of a C function, with the time that the same call takes without work as its `overhead`."""

    def __init__(self, call: Callable[[int], object], idle: Callable[[int], object]) -> None:
        self.call = call
        times = []
        for turn in range(300):
            start = time.perf_counter_ns()
            idle(turn)
            times.append(time.perf_counter_ns() - start)
        self.overhead = sorted(times)[len(times) // 2] * 1e-9

    def __call__(self, turn: int) -> object:
        return self.call(turn)


def fastest(candidates: list[Callable[[int], object]]) -> Callable[[int], object]:
    """The one whose calls are the shortest: a peer is measured at its best."""

    def time_of(call: Callable[[int], object]) -> int:
        times = []
        for turn in range(6):
            start = time.perf_counter_ns()
            call(turn)
            times.append(time.perf_counter_ns() - start)
        return min(times[1:])

    return min(candidates, key=time_of)
