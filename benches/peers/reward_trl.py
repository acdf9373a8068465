"""Training of a reward model with TRL and PEFT as a user gets them; prints one line of JSON with speed and memory.

Pairs are tokenized beforehand ({"chosen_ids": [...], "rejected_ids": [...]} a line, prompts included), so that both sides
train on the same tokens; they are taken in the order of the file.
"""

import tempfile

import trl_common
import trl
from datasets import Dataset


def main() -> None:
    options = trl_common.parser(__doc__)
    options.add_argument("--batch", type=int, default=4)
    arguments = options.parse_args()
    rows = trl_common.read_rows(arguments.data)
    clock = trl_common.Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.RewardConfig(
            **trl_common.settings(arguments.dtype, scratch),
            model_init_kwargs={"dtype": arguments.dtype},
            max_length=None,
            train_sampling_strategy="sequential",
            max_steps=len(rows) // arguments.batch,
            per_device_train_batch_size=arguments.batch,
            learning_rate=1e-4,
            logging_steps=1,
        )
        trainer = trl.RewardTrainer(
            model=str(arguments.model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
            peft_config=trl_common.lora("SEQ_CLS", modules_to_save=["score"]),
        )
        trl_common.train(trainer)
    trl_common.tell(
        config.gradient_checkpointing,
        pairs_per_s=arguments.batch / clock.seconds_a_step(),
        losses=trl_common.logged(trainer, "loss"),
    )


if __name__ == "__main__":
    main()
