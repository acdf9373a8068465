"""Training of a reward model with TRL and PEFT as a user gets them; prints one line of JSON with speed and memory.

Pairs are tokenized beforehand ({"chosen_ids": [...], "rejected_ids": [...]} a line, prompts included), so that both sides
train on the same tokens; they are taken in the order of the file.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from sft_trl import peak_rss_bytes

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory, tokenizer included")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]

    class Clock(transformers.TrainerCallback):
        """When each optimizer step ended."""

        def __init__(self):
            self.ended: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ended.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.RewardConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=arguments.dtype == "bfloat16",
            model_init_kwargs={"dtype": arguments.dtype},
            max_length=None,
            train_sampling_strategy="sequential",
            max_steps=len(rows) // arguments.batch,
            per_device_train_batch_size=arguments.batch,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trl.RewardTrainer(
            model=str(arguments.model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
            peft_config=peft.LoraConfig(
                task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear",
                modules_to_save=["score"],
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    seconds = clock.ended[-1] - clock.ended[0]
    pairs = (len(clock.ended) - 1) * arguments.batch
    print(
        json.dumps(
            {
                "peer": "trl",
                "versions": {"trl": trl.__version__, "peft": peft.__version__, "torch": torch.__version__},
                "gradient_checkpointing": config.gradient_checkpointing,
                "pairs_per_s": pairs / seconds,
                "peak_rss_bytes": peak_rss_bytes(),
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            }
        )
    )


if __name__ == "__main__":
    main()
