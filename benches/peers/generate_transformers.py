"""Decoding and prefill speed of transformers; prints one line of JSON.

Prompts are the same tokens drawn from a seed, no stop token ends a row early, decoding is greedy. Decoding speed counts
the tokens after the first of each row and the time after prefill, which is timed by itself.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512], help="tokens of prompts that time prefill")
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype)
    ).to(arguments.device)
    model.eval()
    generator = torch.Generator().manual_seed(0)

    def draw(batch: int, length: int) -> torch.Tensor:
        # Ids below 64 may be special tokens.
        return torch.randint(64, model.config.vocab_size, (batch, length), generator=generator).to(arguments.device)

    def timed(call) -> float:
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def generate(input_ids: torch.Tensor, new_tokens: int) -> None:
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        if output.shape[1] != input_ids.shape[1] + new_tokens:
            raise SystemExit(f"asked for {new_tokens} new tokens, got {output.shape[1] - input_ids.shape[1]}")

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    decode = {}
    with torch.inference_mode():
        generate(draw(1, 8), 4)
        for batch in arguments.batch:
            prompts = draw(batch, arguments.prompt)
            rates = []
            for _ in range(arguments.repeats):
                first = timed(lambda: generate(prompts, 1))
                whole = timed(lambda: generate(prompts, arguments.new_tokens))
                rates.append(batch * (arguments.new_tokens - 1) / (whole - first))
            decode[str(batch)] = median(rates)
        prefill = {}
        for length in arguments.prefill:
            long_prompt = draw(1, length)
            rates = [length / timed(lambda: generate(long_prompt, 1)) for _ in range(arguments.repeats)]
            prefill[str(length)] = median(rates)

    print(
        json.dumps(
            {
                "peer": "transformers",
                "versions": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
                "dtype": arguments.dtype,
                "device": arguments.device,
                "threads": torch.get_num_threads(),
                "prompt": arguments.prompt,
                "new_tokens": arguments.new_tokens,
                **{f"decode_tokens_per_s_batch_{batch}": rate for batch, rate in decode.items()},
                **{f"prefill_{length}_tokens_per_s": rate for length, rate in prefill.items()},
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
