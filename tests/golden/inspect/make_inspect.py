"""Makes what looking inside is compared with, from transformers' hidden states of tiny decoders.

    python make_inspect.py

It needs torch and transformers, and reads the folders that ../transformer/make_tiny.py made.
Written beside this file, NAME.npz for gpt2, llama and qwen2, float32:

    ids [12]             one sequence
    attention [L, N, 12, 12]
    lens [L + 1, 12, V]  log-probabilities of the hidden states before each block and after the
                         last, through the model's own norm and head
    without [L, N, 12, V]  logits with what one head writes set to zero, by a hook
    versions             what made the file
"""

import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
NAMES = ("gpt2", "llama", "qwen2")


@torch.inference_mode()
def make(name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE.parent / "transformer" / name, attn_implementation="eager", dtype=torch.float32
    ).eval()
    if name == "gpt2":
        blocks, norm = model.transformer.h, model.transformer.ln_f
        outs = [block.attn.c_proj for block in blocks]
    else:
        blocks, norm = model.model.layers, model.model.norm
        outs = [block.self_attn.o_proj for block in blocks]
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, 12))
    leaving = []  # of the last block, before the norm
    hook = blocks[-1].register_forward_hook(
        lambda _, __, out: leaving.append(out[0] if isinstance(out, tuple) else out)
    )
    found = model(ids, output_hidden_states=True, output_attentions=True)
    hook.remove()
    stream = [*found.hidden_states[:-1], leaving[0].reshape(found.hidden_states[-1].shape)]
    lens = [model.lm_head(norm(x))[0].log_softmax(-1) for x in stream]
    num_heads = found.attentions[0].shape[1]
    without = [[silenced(model, ids, out, head, num_heads) for head in range(num_heads)]
               for out in outs]  # fmt: skip
    np.savez_compressed(
        HERE / f"{name}.npz",
        ids=ids[0].numpy().astype(np.int32),
        attention=torch.cat(found.attentions).numpy(),
        lens=torch.stack(lens).numpy(),
        without=np.array(without),
        versions=versions(),
    )


def silenced(model, ids, out, head: int, num_heads: int) -> np.ndarray:
    """The logits if what one head writes is nothing."""

    def silence(_, inputs):
        (y,) = inputs
        width = y.shape[-1] // num_heads
        y = y.clone()
        y[..., head * width : (head + 1) * width] = 0
        return (y,)

    hook = out.register_forward_pre_hook(silence)
    logits = model(ids).logits[0].numpy()
    hook.remove()
    return logits


def versions() -> str:
    """What made a golden file."""
    packages = [f"{name} {version(name)}" for name in ("numpy", "torch", "transformers")]
    return ", ".join([f"python {platform.python_version()}", *packages])


if __name__ == "__main__":
    for name in NAMES:
        make(name)
