"""One run of a parameter-efficient method with PEFT, or AdapterHub's package; prints one line of JSON.

The job (a file of JSON that `peft` of pt-benches writes) says which method, on which rows in which order, with which learning
rate at each step; both sides get the same. The loop is a plain one: PEFT's model, its own loss, AdamW, clipping. Loss and
accuracy are those of the trained tokens; the held-out ones are averaged over all of them.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers

EVAL_BATCH = 8


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def read_rows(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each `[batch_size, seq_len]`."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values, pad):
        return torch.tensor([list(row) + [pad] * (longest - len(row)) for row in values])

    labels = [
        [token if label else -100 for token, label in zip(row["input_ids"], row["is_label"])] for row in rows
    ]
    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded(labels, -100),
    }


def base_model(job: dict, path: Path):
    """The model in f32, or for QLoRA in bitsandbytes' NF4 with double quantization."""
    if not job["is_nf4"]:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    import peft

    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def with_peft(model, method: str):
    import peft

    if method in ("lora", "dora", "qlora"):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            use_dora=method == "dora",
        )
    elif method == "ia3":
        config = peft.IA3Config(task_type="CAUSAL_LM")
    elif method == "prompt_tuning":
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=20, prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB
        )
    elif method == "prefix_tuning":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    else:
        raise SystemExit(f"PEFT has no method {method!r}")
    model = peft.get_peft_model(model, config)
    return model, lambda folder: model.save_pretrained(folder), {"peft": peft.__version__}


def with_adapter_hub(model):
    import adapters

    adapters.init(model)
    model.add_adapter("default", config=adapters.SeqBnConfig())
    model.set_active_adapters("default")
    model.train_adapter("default")

    def save(folder):
        model.save_adapter(folder, "default", with_head=False, use_safetensors=True)

    return model, save, {"adapters": adapters.__version__}


def optimizer_of(job: dict, parameters: list[torch.nn.Parameter]):
    """AdamW; for QLoRA bitsandbytes' in 8 bits where it runs on this device (paged it needs CUDA)."""
    settings = dict(lr=job["learning_rates"][0], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    if job["is_nf4"]:
        try:
            import bitsandbytes

            probe = torch.nn.Parameter(torch.zeros(8192))
            probe.grad = torch.ones_like(probe)
            bitsandbytes.optim.AdamW8bit([probe], **settings).step()
            return bitsandbytes.optim.AdamW8bit(parameters, **settings), "bitsandbytes AdamW8bit"
        except Exception as error:  # Its errors on a device without kernels are of many kinds.
            return torch.optim.AdamW(parameters, **settings), f"torch AdamW ({type(error).__name__} in AdamW8bit)"
    return torch.optim.AdamW(parameters, **settings), "torch AdamW"


def held_out(model, rows: list[dict]) -> dict[str, float]:
    """Mean -log p of the labels, nats, and the share of them that were the most probable tokens."""
    total, correct, count = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), EVAL_BATCH):
            batch = collate(rows[start : start + EVAL_BATCH])
            labels = batch.pop("labels")
            # Virtual tokens of a prompt stand before those of the rows.
            logits = model(**batch).logits[:, -labels.shape[1] :]
            is_label = labels[:, 1:] != -100
            logprobs = torch.log_softmax(logits[:, :-1][is_label].double(), dim=-1)
            wanted = labels[:, 1:][is_label]
            total -= logprobs.gather(1, wanted[:, None]).sum().item()
            correct += (logprobs.argmax(dim=-1) == wanted).sum().item()
            count += len(wanted)
    return {"held_out_loss": total / count, "held_out_accuracy": correct / count, "held_out_labels": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(job["seed"])

    model = base_model(job, arguments.model)
    is_adapter_hub = job["method"] == "bottleneck"
    model, save, versions = with_adapter_hub(model) if is_adapter_hub else with_peft(model, job["method"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, optimizer_name = optimizer_of(job, parameters)
    rows = read_rows(job["rows"])
    model.train()
    losses, seconds = [], []
    for step, learning_rate in enumerate(job["learning_rates"]):
        started = time.perf_counter()
        chosen = job["order"][step * job["batch"] : (step + 1) * job["batch"]]
        loss = model(**collate([rows[index] for index in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    result = {
        "num_trainable": sum(parameter.numel() for parameter in parameters),
        "step_seconds": statistics.median(seconds[1:] or seconds),
        "peak_rss_bytes": peak_rss_bytes(),
        "losses": losses,
        "optimizer": optimizer_name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, **versions},
    }
    if job["held_out"]:
        result.update(held_out(model, read_rows(job["held_out"])))
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        result["adapter_bytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
