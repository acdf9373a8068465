"""What the scripts that measure trainers of TRL share."""

import argparse
import json
import os
import time
from pathlib import Path

from sft_trl import peak_rss_bytes

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import peft
import torch
import transformers
import trl

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all of them take."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--model", type=Path, required=True, help="a Hugging Face directory, tokenizer included")
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return options


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings(dtype: str, scratch: str) -> dict:
    """Fields of every trainer's configuration."""
    return {
        "output_dir": scratch,
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def lora(task_type: str, **fields) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type=task_type, r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", **fields
    )


class Clock(transformers.TrainerCallback):
    """When each optimizer step, or iteration, ended."""

    def __init__(self):
        self.ended: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ended.append(time.perf_counter())

    def seconds_a_step(self) -> float:
        """The mean of all but the first."""
        return (self.ended[-1] - self.ended[0]) / (len(self.ended) - 1)


def train(trainer) -> None:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def tell(gradient_checkpointing: bool, **measured) -> None:
    """Prints the line of JSON."""
    versions = {"trl": trl.__version__, "peft": peft.__version__, "torch": torch.__version__}
    result = {"peer": "trl", "versions": versions, "gradient_checkpointing": gradient_checkpointing, **measured}
    print(json.dumps(result | {"peak_rss_bytes": peak_rss_bytes()}))


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
