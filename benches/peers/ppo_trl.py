"""PPO with TRL and PEFT as a user gets them; prints one line of JSON with speed and memory.

Prompts are token ids ({"input_ids": [...]} a line). The policy has LoRA, its reference is the model without it; the value
model and the reward model are sequence classifiers of the same size, the former trained, as in TRL's own example. No token
ends a response, so that all are as long as they may be. Needs TRL 1.12, the last with PPO.
"""

import tempfile

import torch
import transformers
import trl_common
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    options = trl_common.parser(__doc__)
    options.add_argument("--prompts", type=int, default=16, help="of an iteration")
    options.add_argument("--response-length", type=int, default=53)
    arguments = options.parse_args()
    rows = trl_common.read_rows(arguments.data)
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

    clock = trl_common.Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = PPOConfig(
            **trl_common.settings(arguments.dtype, scratch),
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
            peft_config=trl_common.lora("CAUSAL_LM"),
        )
        trl_common.train(trainer)
    trl_common.tell(
        trainer.policy_model.is_gradient_checkpointing,
        samples_per_s=arguments.prompts / clock.seconds_a_step(),
        iteration_s=clock.seconds_a_step(),
    )


if __name__ == "__main__":
    main()
