"""Decoding and prefill speed of llama.cpp through llama-cpp-python's C functions; prints one line of JSON.

`--weights` other than what the file holds are made from it by llama.cpp's own quantizer, once, beside it: first f16,
from that the others. Where the package cannot be imported it prints {"skipped": reason} and succeeds.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import time
from pathlib import Path


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def requantized(llama_cpp, source: Path, weights: str) -> Path:
    """The file with its matrices as `weights`, norms left alone."""
    target = source.with_name(f"{source.name.split('.')[0]}.llama-cpp-{weights}.gguf")
    if target.exists():
        return target
    if weights != "F16":
        source = requantized(llama_cpp, source, "F16")
    kinds = {
        "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    }
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kinds[weights]
    parameters.allow_requantize = True
    partial = target.with_suffix(".partial")
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters))
    if failed:
        raise SystemExit(f"llama_model_quantize failed on {source.name} ({failed})")
    partial.replace(target)
    return target


class Model:
    """A file and a context, used as llama-bench uses them."""

    def __init__(self, llama_cpp, path: Path, room: int, batch: int, threads: int) -> None:
        self.api = llama_cpp
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path.name}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = room
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context for {path.name}")
        self.greedy = llama_cpp.llama_sampler_init_greedy()
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def run(self, tokens: list[int]) -> int:
        """Adds `tokens`; the greedy next one."""
        array = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")
        return self.api.llama_sampler_sample(self.greedy, self.context, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--weights", default="as shipped", choices=["as shipped", "F16", "Q4_0", "IQ4_NL"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    try:
        import llama_cpp
    except Exception as error:  # a missing package, or one built for another processor
        print(json.dumps({"peer": "llama.cpp", "skipped": f"llama-cpp-python cannot be imported: {error}"}))
        return

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    path = arguments.model
    if arguments.weights != "as shipped":
        path = requantized(llama_cpp, path, arguments.weights)
    room = max(*arguments.prefill, arguments.prompt + arguments.new_tokens)
    model = Model(llama_cpp, path, room, max(arguments.prefill), arguments.threads)
    drawn = random.Random(0)

    def draw(length: int) -> list[int]:
        # Ids below 64 may be special tokens.
        return [drawn.randrange(64, model.vocabulary) for _ in range(length)]

    def prefill(prompt: list[int]) -> float:
        model.reset()
        start = time.perf_counter()
        model.run(prompt)
        return time.perf_counter() - start

    def decode(prompt: list[int]) -> float:
        model.reset()
        token = model.run(prompt)
        start = time.perf_counter()
        for _ in range(arguments.new_tokens):
            token = model.run([token])
        return time.perf_counter() - start

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    prefill(draw(8))
    prompt = draw(arguments.prompt)
    result = {
        "peer": "llama.cpp",
        "versions": {"llama_cpp_python": llama_cpp.__version__},
        "weights": path.name,
        "weights_bytes": path.stat().st_size,
        "threads": arguments.threads,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "decode_tokens_per_s_batch_1": median(
            [arguments.new_tokens / decode(prompt) for _ in range(arguments.repeats)]
        ),
    }
    for length in arguments.prefill:
        long = draw(length)
        rates = [length / prefill(long) for _ in range(arguments.repeats)]
        result[f"prefill_{length}_tokens_per_s"] = median(rates)
    result["peak_rss_bytes"] = peak_rss_bytes()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
