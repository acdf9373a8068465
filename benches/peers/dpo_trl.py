"""Preference training with TRL and PEFT as a user gets them; prints one line of JSON with speed and memory.

Pairs are tokenized beforehand ({"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]} a line), so that both
sides train on the same tokens; they are taken in the order of the file. The reference is the model without its adapter.
"""

import tempfile

import trl_common
import trl
from datasets import Dataset


class Trainer(trl.DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        # Rows are token ids already.
        return dataset


def main() -> None:
    options = trl_common.parser(__doc__)
    options.add_argument("--batch", type=int, default=4)
    arguments = options.parse_args()
    rows = trl_common.read_rows(arguments.data)
    clock = trl_common.Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            **trl_common.settings(arguments.dtype, scratch),
            model_init_kwargs={"dtype": arguments.dtype},
            max_length=None,
            train_sampling_strategy="sequential",
            max_steps=len(rows) // arguments.batch,
            per_device_train_batch_size=arguments.batch,
            learning_rate=2e-5,
            logging_steps=1,
        )
        trainer = Trainer(
            model=str(arguments.model),
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
            peft_config=trl_common.lora("CAUSAL_LM"),
        )
        trl_common.train(trainer)
    trl_common.tell(
        config.gradient_checkpointing,
        pairs_per_s=arguments.batch / clock.seconds_a_step(),
        losses=trl_common.logged(trainer, "loss"),
    )


if __name__ == "__main__":
    main()
