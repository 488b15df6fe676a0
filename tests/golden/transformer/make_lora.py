"""Make adapters of the tiny decoders with PEFT, and the results of PEFT.

    python make_lora.py

It needs torch, transformers and peft. For each family it writes the folder lora/FAMILY with the
adapter as PEFT saves it and golden.npz: ids [1, T] and logits [1, T, V], float32. All weights of
the adapter are random, including B, which PEFT initializes to zero.
"""

import shutil
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from make_tiny import versions

HERE = Path(__file__).parent
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "llama": peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "gpt2": peft.LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]
    ),
    "gemma3": peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]
    ),
}


def adapted(name: str, config: peft.LoraConfig):
    """Return a tiny decoder with a random adapter."""
    torch.manual_seed(2)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / name, attn_implementation="eager", dtype=torch.float32
    )
    model = peft.get_peft_model(base, config).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0.0, 0.2)
    return model


@torch.inference_mode()
def make(name: str, config: peft.LoraConfig) -> None:
    model, folder = adapted(name, config), HERE / "lora" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = name  # not a path of this machine
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    ids = torch.randint(model.config.vocab_size, (1, 16))
    np.savez_compressed(
        folder / "golden.npz",
        ids=ids.numpy().astype(np.int32),
        logits=model(ids).logits.numpy(),
        versions=f"{versions()}, peft {peft.__version__}",
    )


if __name__ == "__main__":
    for name, config in CONFIGS.items():
        make(name, config)
