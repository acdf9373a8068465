"""Supervised fine-tuning with TRL and PEFT as a user gets them; prints one line of JSON with speed, memory, start-up.

The rows are tokenized beforehand ({"input_ids": [...], "completion_mask": [...]} a line), so that both sides train on
the same tokens; they are taken in the order of the file. Tokens are those of the rows: padding is not counted.
"""

import time

STARTED = time.time()

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def since_process_start() -> float:
    """Seconds since this process began, the interpreter's own start included."""
    try:
        # The part after the name, which may hold spaces; the 20th field from there is the start, in clock ticks.
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time() - STARTED


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def read_rows(path: Path, needed: int) -> list[dict[str, list[int]]]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.append({"input_ids": row["input_ids"], "completion_mask": row["completion_mask"]})
            if len(rows) == needed:
                return rows
    raise SystemExit(f"{path} has {len(rows)} rows; {needed} are needed (steps times batch)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory, tokenizer included")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora-alpha", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--gradient-checkpointing", choices=["default", "on", "off"], default="default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be 2 or more: the first step is not counted")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device == "cuda"
    is_bf16 = arguments.dtype == "bfloat16"
    rows = read_rows(arguments.data, arguments.steps * arguments.batch)
    checkpointing = {"default": {}, "on": {"gradient_checkpointing": True}, "off": {"gradient_checkpointing": False}}

    class Clock(transformers.TrainerCallback):
        """When each optimizer step ended, in seconds since the process began."""

        def __init__(self):
            self.begun = 0.0
            self.ended: list[float] = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun = since_process_start()

        def on_step_end(self, args, state, control, **kwargs):
            if on_gpu:
                torch.cuda.synchronize()
            self.ended.append(since_process_start())

    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.SFTConfig(
            output_dir=scratch,
            use_cpu=not on_gpu,
            bf16=is_bf16,
            model_init_kwargs={"dtype": arguments.dtype},
            completion_only_loss=True,
            max_length=None,
            train_sampling_strategy="sequential",
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **checkpointing[arguments.gradient_checkpointing],
        )
        trainer = trl.SFTTrainer(
            model=str(arguments.model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
            peft_config=peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=arguments.rank,
                lora_alpha=arguments.lora_alpha,
                lora_dropout=0.0,
                target_modules="all-linear",
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    tokens = [
        sum(len(row["input_ids"]) for row in rows[start : start + arguments.batch])
        for start in range(0, len(rows), arguments.batch)
    ]
    seconds = clock.ended[-1] - clock.ended[0]
    result = {
        "peer": "trl",
        "versions": {"trl": trl.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
        "batch": arguments.batch,
        "gradient_checkpointing": config.gradient_checkpointing,
        "tokens_per_s": sum(tokens[1:]) / seconds,
        "tokens_counted": sum(tokens[1:]),
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds_to_training": clock.begun,
        "seconds_to_first_step": clock.ended[0],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if on_gpu:
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
