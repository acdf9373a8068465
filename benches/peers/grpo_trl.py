"""GRPO with TRL and PEFT as a user gets them; prints one line of JSON with speed and memory.

Prompts are token ids ({"input_ids": [...]} a line), several responses are sampled to each, and the share of even token ids
is the reward. No token ends a response, so that all are as long as they may be.
"""

import tempfile

import trl_common
import trl
from datasets import Dataset


def even(completion_ids, **_) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def main() -> None:
    options = trl_common.parser(__doc__)
    options.add_argument("--prompts", type=int, default=4, help="of an iteration")
    options.add_argument("--samples", type=int, default=8, help="of a prompt")
    options.add_argument("--response-length", type=int, default=53)
    arguments = options.parse_args()
    rows = [row["input_ids"] for row in trl_common.read_rows(arguments.data)]

    class Trainer(trl.GRPOTrainer):
        def _tokenize_prompts(self, prompts):
            # Prompts are numbers of rows: the rows are token ids already.
            return [rows[int(prompt)] for prompt in prompts], None, {}

    clock = trl_common.Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.GRPOConfig(
            **trl_common.settings(arguments.dtype, scratch),
            model_init_kwargs={"dtype": arguments.dtype},
            max_steps=len(rows) // arguments.prompts,
            per_device_train_batch_size=arguments.prompts * arguments.samples,
            num_generations=arguments.samples,
            max_completion_length=arguments.response_length,
            # Suppresses what would end a response.
            generation_kwargs={"min_new_tokens": arguments.response_length},
            learning_rate=1e-5,
            logging_steps=1,
        )
        trainer = Trainer(
            model=str(arguments.model),
            args=config,
            reward_funcs=even,
            train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(rows))]),
            callbacks=[clock],
            peft_config=trl_common.lora("CAUSAL_LM"),
        )
        trl_common.train(trainer)
    lengths = trl_common.logged(trainer, "completions/mean_length")
    trl_common.tell(
        config.gradient_checkpointing,
        samples_per_s=arguments.prompts * arguments.samples / clock.seconds_a_step(),
        iteration_s=clock.seconds_a_step(),
        tokens_per_response=sum(lengths) / max(len(lengths), 1),
    )


if __name__ == "__main__":
    main()
