"""Turn the SmolLM2-135M-Instruct GGUF file into a Hugging Face directory that the peers can open.

The weights are dequantized by transformers. Of its tokenizer conversion two things are put right: it puts id 1 in front
of every text, and it takes id 1 for the end of text, where the file says 2 (`<|im_end|>`).
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PROBE = "<|im_start|>user\nHow are you?<|im_end|>\n"
END_OF_TURN = 2


def load_model(gguf: Path, dtype: torch.dtype = torch.float32):
    """The dequantized model, its end of text the one that the file names.

    Without `dequantize` transformers may keep the weights in their blocks and multiply them by a kernel of its own. Even
    with it the model is still marked as quantized and refuses to be saved, so its weights move to a plain one.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config).from_dict(settings)).to(dtype)
    model.load_state_dict(loaded.state_dict())
    for config in (model.config, model.generation_config):
        config.bos_token_id = 1
        config.eos_token_id = END_OF_TURN
        config.pad_token_id = END_OF_TURN
    # A path of this machine would say nothing to another.
    model.config._name_or_path = ""
    return model.eval()


def load_tokenizer(gguf: Path):
    """The tokenizer of the file, adding nothing to what it is given."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.post_processor = None
    for setting in ("add_bos_token", "add_eos_token"):
        if hasattr(tokenizer, setting):
            setattr(tokenizer, setting, False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(END_OF_TURN)
    tokenizer.pad_token = tokenizer.eos_token
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer) -> None:
    ids = tokenizer(PROBE).input_ids
    if ids[:2] == [1, 1] or ids[0] != 1 or END_OF_TURN not in ids:
        raise SystemExit(f"the tokenizer turned {PROBE!r} into {ids}: expected one id 1 in front and a 2 inside")
    if tokenizer.decode(ids) != PROBE:
        raise SystemExit(f"the tokenizer does not give back {PROBE!r} but {tokenizer.decode(ids)!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()

    load_model(arguments.gguf, getattr(torch, arguments.dtype)).save_pretrained(arguments.output)
    load_tokenizer(arguments.gguf).save_pretrained(arguments.output)
    check_tokenizer(AutoTokenizer.from_pretrained(arguments.output))
    print(json.dumps({"output": str(arguments.output), "dtype": arguments.dtype}))


if __name__ == "__main__":
    main()
