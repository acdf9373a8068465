"""GRPO with TRL and PEFT as a user gets them; prints one line of JSON with speed and memory.

Prompts are token ids ({"input_ids": [...]} a line), several responses are sampled to each, and the share of even token ids
is the reward. No token ends a response, so that all are as long as they may be.
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
    parser.add_argument("--prompts", type=int, default=4, help="of an iteration")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--response-length", type=int, default=53)
    return parser.parse_args()


def even(completion_ids, **_) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def main() -> None:
    arguments = parse_arguments()
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [json.loads(line)["input_ids"] for line in arguments.data.read_text(encoding="utf-8").splitlines()]

    class Trainer(trl.GRPOTrainer):
        def _tokenize_prompts(self, prompts):
            # Prompts are numbers of rows: the rows are token ids already.
            return [rows[int(prompt)] for prompt in prompts], None, {}

    class Clock(transformers.TrainerCallback):
        """When each iteration ended."""

        def __init__(self):
            self.ended: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ended.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=arguments.dtype == "bfloat16",
            model_init_kwargs={"dtype": arguments.dtype},
            max_steps=len(rows) // arguments.prompts,
            per_device_train_batch_size=arguments.prompts * arguments.samples,
            num_generations=arguments.samples,
            max_completion_length=arguments.response_length,
            # Suppresses what would end a response.
            generation_kwargs={"min_new_tokens": arguments.response_length},
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=str(arguments.model),
            args=config,
            reward_funcs=even,
            train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(rows))]),
            callbacks=[clock],
            peft_config=peft.LoraConfig(
                task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    iteration = (clock.ended[-1] - clock.ended[0]) / (len(clock.ended) - 1)
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry]
    print(
        json.dumps(
            {
                "peer": "trl",
                "versions": {"trl": trl.__version__, "peft": peft.__version__, "torch": torch.__version__},
                "gradient_checkpointing": config.gradient_checkpointing,
                "samples_per_s": arguments.prompts * arguments.samples / iteration,
                "iteration_s": iteration,
                "tokens_per_response": sum(lengths) / max(len(lengths), 1),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
