"""QLoRA as PEFT and bitsandbytes have it, on the CPU: NF4 with double quantization, bf16 arithmetic, checkpointing.

It loads the model, then takes one optimizer step for each line on stdin and answers with its seconds in a line of JSON;
at the end of its input it says its peak memory. The rows are those of `cargo xtask bench qlora`.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import bitsandbytes
import peft
import torch
import transformers

ROW = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--rows", type=int, default=4)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    input_ids, labels = rows(arguments.rows)
    losses = []
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "versions": {module.__name__: module.__version__ for module in (peft, bitsandbytes, transformers, torch)},
        "threads": torch.get_num_threads(),
        "peak_rss_bytes": peak if os.uname().sysname == "Darwin" else peak * 1024,
        "losses": losses,
    }
    print(json.dumps(result), flush=True)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and labels of the second half of each row."""
    at = torch.arange(ROW // 2)
    halves = [[100 + (at * 7919 + row * 31 + start) % 40_000 for start in (0, 11)] for row in range(count)]
    input_ids = torch.stack([torch.cat(pair) for pair in halves])
    labels = input_ids.clone()
    labels[:, : ROW // 2] = -100
    return input_ids, labels


if __name__ == "__main__":
    main()
