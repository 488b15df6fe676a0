# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention and the key-value cache
#
# Each token is represented by a vector, and the vectors of a text must exchange information: the
# vector of *it* needs to know what *it* refers to. Attention is the only operation of a transformer
# in which one position reads others. We build it from a weighted average, compare each step with
# the library, look at the attention of a real model, and then see why generation does not become
# slower with every token: the key-value cache.
#
# *Needs:* a little linear algebra, and the default model (`pellucid pull`).
# *Takes:* half a minute to run, half an hour to read.
# *Explains:* `transformer/attention.py`, `transformer/cache.py`, `transformer/interpret.py`.

# %%
import time

import checks
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bpe
from serve import settings
from serve.models import catalogue, download
from transformer import attention, cache, checkpoint, decoder, generate, interpret, kernels, rope
from transformer.config import Config

jax.config.update("jax_compilation_cache_dir", str(settings.data_folder() / "compiled"))
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. An average with weights
#
# We have five tokens, each a vector of eight numbers. The simplest way to combine information from
# several tokens is an average. In a causal model, which does not read later tokens, token $t$
# averages the tokens up to $t$. As a matrix:

# %%
T, H = 5, 8
values = rng.normal(size=(T, H))
uniform = np.tril(np.ones((T, T)))
uniform /= uniform.sum(1, keepdims=True)
print(np.round(uniform, 2))
averaged = uniform @ values  # [T, H]

# %% [markdown]
# Every row sums to 1, and all entries above the diagonal are 0. Attention uses such a matrix, but
# its weights are not uniform: they depend on the tokens.
#
# ## 2. Weights from queries and keys
#
# Each token has a *query*, which describes the information that it needs, and a *key*, which
# describes the information that it provides. The dot product of a query and a key is the *score*.
# Softmax converts a row of scores to positive weights. Later positions get a score of minus
# infinity, which becomes a weight of exactly 0.


# %%
def softmax(x: np.ndarray) -> np.ndarray:
    """Return positive numbers that sum to 1 over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the output [T, H] and the weights [T, T] of one head; q, k and v are [T, H]."""
    scores = q @ k.T / np.sqrt(q.shape[-1])  # [T, T]
    scores = np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf)
    weights = softmax(scores)
    return weights @ v, weights


queries, keys = rng.normal(size=(2, T, H))
output, weights = attend(queries, keys, values)
print(np.round(weights, 2))

# %% [markdown]
# This is the complete computation. The library does the same for several rows and heads at once:

# %%
library_output, library_weights = attention.attend(
    *(jnp.asarray(x, jnp.float32)[None, :, None] for x in (queries, keys, values))
)
difference = max(
    np.abs(library_output[0, :, 0] - output).max(), np.abs(library_weights[0, 0] - weights).max()
)
print(f"differs from transformer/attention.py by less than 1e-6: {difference < 1e-6}")

# %% [markdown]
# **Why divide by $\sqrt H$?** The dot product of two random vectors of $H$ numbers has a standard
# deviation of $\sqrt H$. Without the division, the scores of wide heads would differ so much that
# softmax would give a weight of nearly 1 to the largest. Then the gradients would vanish.

# %%
for width in (4, 64, 1024):
    q, k = rng.normal(size=(2, 500, width))
    dots = (q * k).sum(1)
    raw, scaled = (softmax(x.reshape(50, 10)).max(1).mean() for x in (dots, dots / width**0.5))
    print(f"H = {width:4}: deviation {dots.std():5.1f}; "
          f"largest of 10 weights {raw:.2f} undivided, {scaled:.2f} divided")  # fmt: skip

# %% [markdown]
# ## 3. Rotary position embeddings
#
# The computation above does not depend on the order of the tokens: if the keys and values are
# permuted, the weighted average is the same. Llama uses rotary embeddings (Su et al. 2021): each
# pair of numbers of a query or key is rotated by an angle that is proportional to the position. The
# dot product of two rotated vectors depends on the difference of the angles, and so on the distance
# between the tokens, not on their absolute positions.

# %%
q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, H)), jnp.float32)
scores = np.zeros((12, 12))
for i in range(12):
    for j in range(12):
        rotated_q = kernels.rotate(q, *rope.angles(jnp.array([[i]]), H, 100.0))
        rotated_k = kernels.rotate(k, *rope.angles(jnp.array([[j]]), H, 100.0))
        scores[i, j] = jnp.sum(rotated_q * rotated_k)
diagonal_ranges = [np.ptp(np.diagonal(scores, offset)) for offset in range(-8, 9)]
print(f"the scores along each diagonal are equal to 1e-4: {max(diagonal_ranges) < 1e-4}")

# %% [markdown]
# ## 4. The attention of a real model
#
# SmolLM2 has 30 layers with 9 heads each. `interpret.attention` returns the attention maps of all
# 270 heads for a sequence.

# %%
path = download.find_path(catalogue.load().models["smollm2-135m-instruct"], settings.data_folder())
params, cfg, metadata = checkpoint.load(path)
encoding = bpe.from_gguf(metadata).encoding
TEXT = "The cat sat down because it was tired. The cat sat"
ids = encoding.encode(TEXT)
tokens = [encoding.decode([id]) for id in ids]
maps = np.asarray(interpret.attention(params, cfg, ids))  # [L, N, T, T]
print(maps.shape, "[L, N, T, T]; rows sum to 1:", bool(np.allclose(maps.sum(-1), 1, atol=1e-5)))

# %% [markdown]
# Three kinds of heads occur in most models. We find the best example of each by its mean attention
# weight: to the previous token; to the first token (an *attention sink*, used if no token is
# relevant); and to the token that *followed* the previous occurrence of the same token. Heads of
# the third kind, *induction heads*, allow a model to continue a pattern that occurred once before
# (Olsson et al. 2022).

# %%
last = len(ids) - 1
repeats = [  # (position of a repeated token, position after its first occurrence)
    (t, ids[:t].index(ids[t]) + 1) for t in range(1, len(ids)) if ids[t] in ids[:t]
]
kinds = {
    "previous token": np.mean([maps[:, :, t, t - 1] for t in range(2, last)], 0),
    "first token": maps[:, :, 2:, 0].mean(-1),
    "induction": np.mean([maps[:, :, t, s] for t, s in repeats], 0),
}
figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
for axis, (kind, mean_weights) in zip(axes, kinds.items(), strict=True):
    layer, head = np.unravel_index(mean_weights.argmax(), mean_weights.shape)
    axis.imshow(np.sqrt(maps[layer, head]), cmap="Blues", vmin=0, vmax=1)
    axis.set_title(f"{kind}\nlayer {layer}, head {head}: {mean_weights.max():.0%}", fontsize=10)
    labels = [token.replace(" ", "·") for token in tokens]
    axis.set_xticks(range(len(ids)), labels, rotation=90, fontsize=8)
    axis.set_yticks(range(len(ids)), labels, fontsize=8)
plt.show()

# %% [markdown]
# An attention map shows which positions a head reads, but not whether the model needs the head. To
# test this, we remove heads and measure the loss of the model (`interpret.ablate`). A sequence of
# random tokens that is repeated can be predicted only by copying. We remove the eight strongest
# induction heads, and for comparison eight random other heads:

# %%
order = np.argsort(-kinds["induction"].ravel())
induction_heads, random_heads = order[:8], rng.permutation(order[8:])[:8]
noise = rng.integers(1000, 40000, 12).tolist() * 2


def repeat_loss(heads: np.ndarray | list) -> float:
    """Return the loss, in nats per token, of the second half of the noise, without some heads."""
    layers_and_heads = [divmod(int(head), cfg.num_heads) for head in heads]
    ablated = interpret.ablate(params, cfg, layers_and_heads)
    alternatives = interpret.alternatives(ablated, cfg, noise, 1)
    return -float(alternatives.token_logprobs[12:].mean())


full_loss = repeat_loss([])
loss_without_induction, loss_without_random = (
    repeat_loss(induction_heads),
    repeat_loss(random_heads),
)
print(f"repeated noise: {full_loss:.1f} nats per token; without 8 induction heads "
      f"{loss_without_induction:.1f}, 8 random heads {loss_without_random:.1f}")  # fmt: skip

# %% [markdown]
# ## 5. The key-value cache
#
# A model generates one token at a time. For the next token it needs the query of the *last*
# position only, but the keys and values of *all* positions. The keys and values of earlier
# positions do not change when a token is appended, because attention is causal. Therefore they are
# stored in a cache.
#
# Here is one layer without a cache, and with the simplest cache:

# %%
tiny = Config.debug(num_layers=1)
tiny_params = decoder.init(jax.random.key(0), tiny)
(layer_params,) = tiny_params.layers
residual = jnp.asarray(rng.normal(size=(1, 10, tiny.d_model)), jnp.float32)


def project(x: jax.Array) -> list[jax.Array]:
    """Return the queries, keys and values of the layer for x [1, T, D], without rotation."""
    num_heads = [tiny.num_heads, tiny.num_kv_heads, tiny.num_kv_heads]
    projections = (layer_params.q, layer_params.k, layer_params.v)
    return [
        decoder.linear(x, p).reshape(*x.shape[:2], n, tiny.head_dim)
        for p, n in zip(projections, num_heads, strict=True)
    ]


without_cache, _ = attention.attend(*project(residual))
cached_keys, cached_values, outputs = [], [], []
for t in range(10):
    q, k, v = project(residual[:, t : t + 1])  # of one token
    cached_keys.append(k)
    cached_values.append(v)
    k, v = (jnp.concatenate(cached, axis=1) for cached in (cached_keys, cached_values))
    # Only the last row of causal attention is needed; pad the queries to make it the last.
    padded = jnp.pad(q, ((0, 0), (t, 0), (0, 0), (0, 0)))
    outputs.append(attention.attend(padded, k, v)[0][:, -1:])
with_cache = jnp.concatenate(outputs, axis=1)
print(f"results with and without the cache differ by less than 1e-5: "
      f"{float(jnp.abs(with_cache - without_cache).max()) < 1e-5}")  # fmt: skip

# %% [markdown]
# The library's cache does not concatenate arrays at each step, because their shapes would change,
# and JAX compiles a program for every shape. It allocates *blocks* of 256 positions. Attention
# iterates over the used blocks with a running maximum and a running sum (`cache.attend`). How much
# memory does the cache need, and how much time does it save?

# %%
per_token = cache.bytes_per_block(cfg, jnp.bfloat16) // cache.BLOCK_SIZE
print(f"the cache of SmolLM2 needs {per_token / 1024:.1f} kB per token in bfloat16, "
      f"{per_token * cfg.max_seq_len / 2**20:.0f} MB for {cfg.max_seq_len:,} tokens")  # fmt: skip
kv_share = cfg.num_kv_heads / cfg.num_heads
print(f"{cfg.num_heads} query heads share {cfg.num_kv_heads} key heads: {kv_share:.0%} of the size "
      "with separate key heads")  # fmt: skip

story = encoding.encode("Once upon a time, in a house by the sea, there lived")
small_params = params.replace(layers=params.layers[:6])  # six layers suffice, and are faster
small_cfg = Config(**{**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__}, "num_layers": 6})


@jax.jit
def next_without_cache(params, ids, length):
    """Return the most likely next token; process the complete sequence."""
    logits, _ = decoder.forward(params, small_cfg, ids)
    return logits[0, length - 1].argmax()


NEW, BUFFER_SIZE = 24, 256
buffer = np.zeros((1, BUFFER_SIZE), np.int32)
buffer[0, : len(story)] = story
next_without_cache(small_params, buffer, len(story)).block_until_ready()  # compile
started = time.perf_counter()
for n in range(len(story), len(story) + NEW):
    buffer[0, n] = next_without_cache(small_params, buffer, n)
seconds_without_cache = time.perf_counter() - started

greedy = generate.SamplingParams(temperature=0.0)
options = dict(sampling_params=greedy)
list(generate.generate(small_params, small_cfg, story, max_new_tokens=2, **options))  # compile
started = time.perf_counter()
generated = list(generate.generate(small_params, small_cfg, story, max_new_tokens=NEW, **options))
seconds_with_cache = time.perf_counter() - started
print(f"the same {NEW} tokens: {generated == buffer[0, len(story) : len(story) + NEW].tolist()}")
is_faster = seconds_with_cache < seconds_without_cache / 3
print(f"the cache reduces the time to less than a third: {is_faster}")

# %% [markdown]
# ## 6. Summary, as assertions

# %%
assert difference < 1e-6, "our attention agrees with the library's"
assert max(diagonal_ranges) < 1e-4, "rotated scores depend on the distance only"
assert np.allclose(np.triu(maps[0, 0], 1), 0), "attention is causal"
assert kinds["previous token"].max() > 0.5
assert kinds["induction"].max() > 0.2
assert loss_without_induction > max(full_loss, loss_without_random) + 1, "induction heads matter"
assert float(jnp.abs(with_cache - without_cache).max()) < 1e-5, "the cache changes nothing"
assert generated == buffer[0, len(story) : len(story) + NEW].tolist(), "the tokens are the same"
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** With a sliding window (Mistral), position $t$ can read at most `window` positions,
# including itself. Return the mask as a list of lists of booleans.


# %% tags=["stub"]
def window_mask(length: int, window: int) -> list[list[bool]]:
    """Return the mask; mask[t][s] is whether position t can read position s."""
    ...


checks.report(checks.window_mask, window_mask)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def window_mask(length: int, window: int) -> list[list[bool]]:
#     return [[t - window < s <= t for s in range(length)] for t in range(length)]
# ```
# </details>
#
# **2.** Softmax subtracts the largest score, but the cache is read in blocks. Use a running
# maximum, a running sum and a running average: from the scores and values of each block, one number
# per position, compute the softmax-weighted average of all values. Process one block at a time.


# %% tags=["stub"]
def online_average(blocks: list[tuple[list[float], list[float]]]) -> float:
    """Return the softmax-weighted average of all values of blocks of (scores, values)."""
    ...


checks.report(checks.online_average, online_average)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def online_average(blocks: list[tuple[list[float], list[float]]]) -> float:
#     largest, total, weighted = -np.inf, 0.0, 0.0
#     for scores, values in blocks:
#         new_largest = max(largest, max(scores))
#         scale = float(np.exp(largest - new_largest))  # previous sums used a smaller maximum
#         weights = np.exp(np.array(scores) - new_largest)
#         total = total * scale + float(weights.sum())
#         weighted = weighted * scale + float(weights @ np.array(values))
#         largest = new_largest
#     return weighted / total
# ```
# </details>
#
# **3.** How many bytes does a cache for `tokens` positions need? Each of `layers` layers stores a
# key and a value for each of `kv_heads` heads, of `width` numbers with `bytes_each` bytes.


# %% tags=["stub"]
def cache_bytes(tokens: int, layers: int, kv_heads: int, width: int, bytes_each: int) -> int:
    """Return the size of a key-value cache in bytes."""
    ...


checks.report(checks.cache_bytes, cache_bytes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cache_bytes(tokens: int, layers: int, kv_heads: int, width: int, bytes_each: int) -> int:
#     return 2 * tokens * layers * kv_heads * width * bytes_each
# ```
# </details>
#
# Read next: `transformer/decoder.py` about the block that contains attention, and
# `transformer/cache.py`, which implements the second exercise in XLA.
