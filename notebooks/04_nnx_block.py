# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The same block in flax nnx
#
# In `transformer/`, the weights are a tree of arrays and the model is a function of them. Most
# other JAX code combines both in modules, for example with flax's `nnx`. This notebook implements
# the decoder as modules, copies our weights, and compares the logits. Read it next to
# `transformer/decoder.py`.
#
# *Needs:* nothing but the packages. *Takes:* ten seconds to run.
# *Explains:* `transformer/decoder.py`, by contrast.

# %%
import time

import checks
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer import decoder, kernels, rope
from transformer.config import Config

cfg = Config.debug()
params = decoder.init(jax.random.key(0), cfg)
print(cfg.num_layers, "layers,", cfg.num_params, "weights")

# %% [markdown]
# ## Modules
#
# A module contains its weights: they are initialized in `__init__`, with the random streams `rngs`,
# and used in `__call__`. `nnx.Linear` stores its matrix as `[in, out]`; ours, and those in model
# files, are `[out, in]`.


# %%
class Attention(nnx.Module):
    """Causal attention with grouped key-value heads and rotary positions."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.q = nnx.Linear(cfg.d_model, heads, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(cfg.d_model, kv_heads, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(cfg.d_model, kv_heads, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(heads, cfg.d_model, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        split = lambda y: y.reshape(batch, length, -1, self.cfg.head_dim)  # noqa: E731
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        angles = rope.angles(positions, self.cfg.head_dim, self.cfg.rope_theta)
        q, k = kernels.rotate(q, *angles), kernels.rotate(k, *angles)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # [B, T, N, H]
        return self.out(y.reshape(batch, length, -1))


class Block(nnx.Module):
    """Norm, attention, add; norm, gated MLP, add."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.attn_norm = nnx.RMSNorm(cfg.d_model, epsilon=cfg.norm_eps, rngs=rngs)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(cfg.d_model, epsilon=cfg.norm_eps, rngs=rngs)
        self.gate = nnx.Linear(cfg.d_model, cfg.d_ff, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(cfg.d_model, cfg.d_ff, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(cfg.d_ff, cfg.d_model, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attn_norm(x))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Token ids [B, T] to logits [B, T, V]."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(cfg.vocab_size, cfg.d_model, rngs=rngs)
        self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.num_layers)])
        self.final_norm = nnx.RMSNorm(cfg.d_model, epsilon=cfg.norm_eps, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.final_norm(x))  # tied input and output embeddings


model = Decoder(cfg, rngs=nnx.Rngs(0))

# %% [markdown]
# ## Copy the weights
#
# A module is mutable: its weights are replaced in place. This is convenient here, and it is the
# main difference: our functions receive the weights as arguments and cannot change them.


# %%
def copy(linear: nnx.Linear, ours: decoder.Linear) -> None:
    """Copy the weight of one of our linear layers to one of nnx."""
    linear.kernel[...] = ours.weight.T


model.embed.embedding[...] = params.embed.weight
for block, layer in zip(model.blocks, params.layers, strict=True):
    for name in ("q", "k", "v", "out"):
        copy(getattr(block.attention, name), getattr(layer, name))
    for name in ("gate", "up", "down"):
        copy(getattr(block, name), getattr(layer, name))
    block.attn_norm.scale[...] = layer.attn_norm.scale
    block.mlp_norm.scale[...] = layer.mlp_norm.scale
model.final_norm.scale[...] = params.final_norm.scale

# %%
ids = jax.random.randint(jax.random.key(1), (2, 20), 0, cfg.vocab_size)
ours, _ = decoder.forward(params, cfg, ids)
difference = float(jnp.abs(model(ids) - ours).max())
print(f"logits differ by less than 1e-5: {difference < 1e-5}")

# %% [markdown]
# ## Cost of a call
#
# `nnx.split` separates a module into its structure and the tree of its arrays. Inside `jax.jit`,
# both versions run the same program. The overhead of a call differs: `nnx.jit` traverses the module
# in Python on each call, while our function receives a tree that JAX flattens in C++.

# %%
structure, state = nnx.split(model)
leaves = jax.tree.leaves(state)
param_leaves = jax.tree.leaves(params)
print(len(leaves), "arrays of", sum(leaf.size for leaf in leaves), "numbers")
print(len(param_leaves), "arrays of", sum(x.size for x in param_leaves), "numbers in our tree")

as_module = nnx.jit(lambda model, ids: model(ids))
as_function = jax.jit(lambda params, ids: decoder.forward(params, cfg, ids)[0])
short_ids = ids[:1, :2]


def microseconds(call) -> float:
    """Return the time of the fastest of many calls."""
    call().block_until_ready()
    best = np.inf
    for _ in range(300):
        started = time.perf_counter()
        call().block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best * 1e6


module_time = microseconds(lambda: as_module(model, short_ids))
function_time = microseconds(lambda: as_function(params, short_ids))
print(f"a call of the function is faster: {function_time < module_time}")

# %% [markdown]
# A decoder is called a hundred times per second, so each millisecond matters. This is one reason
# why the library does not use modules. The other reason is readability: a module hides its arrays,
# and this library is written to show them.

# %%
assert difference < 1e-5, "the logits are the same"
assert sum(leaf.size for leaf in leaves) == cfg.num_params
print("all true")

# %% [markdown]
# ## Exercise
#
# RMS norm divides a vector by the root of its mean square, and then multiplies it by a scale.
# Implement it with `eps`, which is added to the mean square to avoid a division by zero.


# %% tags=["stub"]
def rms_norm(x: list[float], scale: list[float], eps: float) -> list[float]:
    """Return the RMS norm of one vector."""
    ...


checks.report(checks.rms_norm, rms_norm)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def rms_norm(x: list[float], scale: list[float], eps: float) -> list[float]:
#     rms = (sum(number * number for number in x) / len(x) + eps) ** 0.5
#     return [number / rms * weight for number, weight in zip(x, scale, strict=True)]
# ```
# </details>
#
# Read next: `transformer/decoder.py: block`.
