"""Makes three tiny random decoders with transformers, and what transformers computes with them.

    python make_tiny.py

It needs torch and transformers (`pip install -e '.[parity]'`). Each of gpt2, llama and qwen2 gets a
folder as transformers saves it, config.json and model.safetensors, and beside them golden.npz:

    ids [2, 24]                 token ids
    logits [2, 24, V]           float32, as everything below
    residual [L, 2, 24, D]      the stream entering each block
    attention [L, 2, N, 24, 24] attention weights
    versions                    what made the file

All weights are drawn at random, biases and norms too: zeros and ones would hide a mistake in them.
"""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
LLAMA_SIZES = dict(
    vocab_size=160,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=160, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": transformers.LlamaConfig(  # heads wider than hidden_size / num_attention_heads
        **LLAMA_SIZES, head_dim=12, rms_norm_eps=1e-5, tie_word_embeddings=False
    ),
    "qwen2": transformers.Qwen2Config(
        **LLAMA_SIZES,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}


@torch.inference_mode()
def make(name: str, config: transformers.PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    for key, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and key.endswith("weight")
        parameter.normal_(1.0 if is_scale else 0.0, 0.2)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(config.vocab_size, (2, 24))
    out = model(ids, output_hidden_states=True, output_attentions=True)
    np.savez_compressed(
        folder / "golden.npz",
        ids=ids.numpy().astype(np.int32),
        logits=out.logits.numpy(),
        # transformers puts the last one through the final norm: it is not the stream any more.
        residual=torch.stack(out.hidden_states[:-1]).numpy(),
        attention=torch.stack(out.attentions).numpy(),
        versions=versions(),
    )


def versions() -> str:
    """What made a golden file."""
    packages = [f"{name} {version(name)}" for name in ("numpy", "torch", "transformers")]
    return ", ".join([f"python {platform.python_version()}", *packages])


if __name__ == "__main__":
    for name, config in CONFIGS.items():
        make(name, config)
