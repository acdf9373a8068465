"""Decoding and prefill speed of llama.cpp through llama-cpp-python; prints one line of JSON.

Where the package is not installed it prints {"skipped": reason} and succeeds: it has to be compiled on most machines.
The weights stay as the GGUF file has them, so the numbers stand beside ours as another trade, not as the same work.
"""

import argparse
import json
import os
import random
import resource
import time
from pathlib import Path


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    try:
        import llama_cpp
    except Exception as error:  # a missing package, or one built for another processor
        print(json.dumps({"peer": "llama.cpp", "skipped": f"llama-cpp-python cannot be imported: {error}"}))
        return

    room = max(arguments.prefill, arguments.prompt + arguments.new_tokens)
    model = llama_cpp.Llama(
        model_path=str(arguments.model),
        n_ctx=room,
        n_batch=arguments.prefill,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        verbose=False,
    )
    drawn = random.Random(0)

    def draw(length: int) -> list[int]:
        # Ids below 64 may be special tokens.
        return [drawn.randrange(64, model.n_vocab()) for _ in range(length)]

    def prefill(prompt: list[int]) -> float:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        return time.perf_counter() - start

    def decode(prompt: list[int]) -> float:
        prefill(prompt)
        start = time.perf_counter()
        for _ in range(arguments.new_tokens):
            model.eval([model.sample(temp=0.0)])
        return time.perf_counter() - start

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    prefill(draw(8))
    short, long = draw(arguments.prompt), draw(arguments.prefill)
    decode_rate = median([arguments.new_tokens / decode(short) for _ in range(arguments.repeats)])
    prefill_rate = median([arguments.prefill / prefill(long) for _ in range(arguments.repeats)])
    print(
        json.dumps(
            {
                "peer": "llama.cpp",
                "versions": {"llama_cpp_python": llama_cpp.__version__},
                "dtype": "as in the file",
                "threads": arguments.threads,
                "prompt": arguments.prompt,
                "new_tokens": arguments.new_tokens,
                "prefill": arguments.prefill,
                "decode_tokens_per_s_batch_1": decode_rate,
                "prefill_tokens_per_s": prefill_rate,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
