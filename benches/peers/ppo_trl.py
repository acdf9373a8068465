"""PPO with TRL and PEFT as a user gets them; prints one line of JSON with speed and memory.

Prompts are token ids ({"input_ids": [...]} a line). The policy has LoRA, its reference is the model without it; the value
model and the reward model are sequence classifiers of the same size, the former trained, as in TRL's own example. No token
ends a response, so that all are as long as they may be. Needs TRL 1.12, the last with PPO.
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
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory, tokenizer included")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=16, help="of an iteration")
    parser.add_argument("--response-length", type=int, default=53)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    dtype = getattr(torch, arguments.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    # An id that no prompt holds; a sampled one would cut its response short.
    tokenizer.pad_token_id = 0

    def classifier():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            arguments.model, num_labels=1, dtype=dtype
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    class Clock(transformers.TrainerCallback):
        """When each iteration ended."""

        def __init__(self):
            self.ended: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ended.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = PPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=arguments.dtype == "bfloat16",
            total_episodes=len(rows),
            per_device_train_batch_size=arguments.prompts,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=4,
            local_rollout_forward_batch_size=arguments.prompts,
            response_length=arguments.response_length,
            temperature=1.0,
            learning_rate=1e-5,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = Dataset.from_list(rows)
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype),
            ref_model=None,
            reward_model=classifier(),
            value_model=classifier(),
            train_dataset=dataset,
            eval_dataset=dataset,
            callbacks=[clock],
            peft_config=peft.LoraConfig(
                task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    iteration = (clock.ended[-1] - clock.ended[0]) / (len(clock.ended) - 1)
    print(
        json.dumps(
            {
                "peer": "trl",
                "versions": {"trl": trl.__version__, "peft": peft.__version__, "torch": torch.__version__},
                "gradient_checkpointing": trainer.policy_model.is_gradient_checkpointing,
                "samples_per_s": arguments.prompts / iteration,
                "iteration_s": iteration,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
