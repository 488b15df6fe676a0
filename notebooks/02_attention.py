# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention, and the memory it leaves behind
#
# A token becomes a vector, and the vectors of a text must learn of each other: *it* must find out
# what it refers to. Attention is the only place in a transformer where one position reads another.
# We build it from a weighted average, check each step against the library, look at what real heads
# look at, and then ask why a chat does not get slower with every word: the key-value cache.
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
# Five tokens, each a vector of eight numbers. The plainest way for a token to hear of the others is
# an average. If the future may not be read, token $t$ averages the tokens up to $t$. As a matrix:

# %%
T, H = 5, 8
values = rng.normal(size=(T, H))
even = np.tril(np.ones((T, T)))
even /= even.sum(1, keepdims=True)
print(np.round(even, 2))
averaged = even @ values  # [T, H]

# %% [markdown]
# Every row sums to 1, and nothing stands above the diagonal. Attention is this matrix, except that
# the weights are not even: they depend on what the tokens are.
#
# ## 2. Weights from questions and answers
#
# Each token asks for something (its *query*) and offers something (its *key*). How well an offer
# meets a question is their dot product, the *score*. Softmax makes positive weights of a row of
# scores, and the future gets a score of minus infinity, which becomes a weight of exactly 0.


# %%
def softmax(x: np.ndarray) -> np.ndarray:
    """Positive numbers that sum to 1 over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One head: [T, H] three times -> what was read [T, H], and the weights [T, T]."""
    scores = q @ k.T / np.sqrt(q.shape[-1])  # [T, T]
    scores = np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf)
    weights = softmax(scores)
    return weights @ v, weights


queries, keys = rng.normal(size=(2, T, H))
read, weights = attend(queries, keys, values)
print(np.round(weights, 2))

# %% [markdown]
# That is all of it. The library does the same for several rows and heads at a time:

# %%
theirs, their_weights = attention.attend(
    *(jnp.asarray(x, jnp.float32)[None, :, None] for x in (queries, keys, values))
)
difference = max(np.abs(theirs[0, :, 0] - read).max(), np.abs(their_weights[0, 0] - weights).max())
print(f"differs from transformer/attention.py by less than 1e-6: {difference < 1e-6}")

# %% [markdown]
# **Why divide by $\sqrt H$?** The dot product of two random vectors of $H$ numbers has a standard
# deviation of $\sqrt H$. Undivided, the scores of wide heads would be far apart and softmax would
# give nearly everything to the largest: nothing left to learn from.

# %%
for width in (4, 64, 1024):
    q, k = rng.normal(size=(2, 500, width))
    dots = (q * k).sum(1)
    raw, scaled = (softmax(x.reshape(50, 10)).max(1).mean() for x in (dots, dots / width**0.5))
    print(f"H = {width:4}: deviation {dots.std():5.1f}; "
          f"largest of 10 weights {raw:.2f} undivided, {scaled:.2f} divided")  # fmt: skip

# %% [markdown]
# ## 3. Where am I? Rotary positions
#
# Nothing above knows about order: shuffle the keys and values, and the weighted average stays.
# Llama's answer (Su et al. 2021) is to turn each query and key, pair of numbers by pair, by an
# angle that grows with its position. A dot product of two turned vectors depends on the difference
# of the angles: on how far apart the tokens are, not on where they stand.

# %%
q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, H)), jnp.float32)
scores = np.zeros((12, 12))
for i in range(12):
    for j in range(12):
        turned = kernels.rotate(q, *rope.angles(jnp.array([[i]]), H, 100.0))
        other = kernels.rotate(k, *rope.angles(jnp.array([[j]]), H, 100.0))
        scores[i, j] = jnp.sum(turned * other)
along = [np.ptp(np.diagonal(scores, offset)) for offset in range(-8, 9)]
print(f"along each diagonal all scores are alike to within 1e-4: {max(along) < 1e-4}")

# %% [markdown]
# ## 4. What real heads look at
#
# SmolLM2 has 30 layers of 9 heads. `inspect.attention` reads a sequence and returns all 270 maps.

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
# Three kinds of heads turn up in most models. Let us find the best example of each by a number:
# how much it looks at the token before, how much at the first token (a place to look when there is
# nothing to look for: an *attention sink*), and how much at the token that *followed* the same
# token last time. This last kind, the *induction head*, is how a model goes on with a pattern that
# it has seen once (Olsson et al. 2022).

# %%
last = len(ids) - 1
again = [  # (position, where its earlier copy's successor stands)
    (t, ids[:t].index(ids[t]) + 1) for t in range(1, len(ids)) if ids[t] in ids[:t]
]
kinds = {
    "looks at the token before": np.mean([maps[:, :, t, t - 1] for t in range(2, last)], 0),
    "looks at the first token": maps[:, :, 2:, 0].mean(-1),
    "looks at what came next last time": np.mean([maps[:, :, t, s] for t, s in again], 0),
}
figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
for axis, (kind, how_much) in zip(axes, kinds.items(), strict=True):
    layer, head = np.unravel_index(how_much.argmax(), how_much.shape)
    axis.imshow(np.sqrt(maps[layer, head]), cmap="Blues", vmin=0, vmax=1)
    axis.set_title(f"{kind}\nlayer {layer}, head {head}: {how_much.max():.0%}", fontsize=10)
    labels = [token.replace(" ", "·") for token in tokens]
    axis.set_xticks(range(len(ids)), labels, rotation=90, fontsize=8)
    axis.set_yticks(range(len(ids)), labels, fontsize=8)
plt.show()

# %% [markdown]
# A map says where a head looks, not what it does with what it sees, nor whether that matters. To
# ask that, take heads out and see how much worse the model predicts (`inspect.ablate`). Noise that
# is repeated can only be predicted by copying. We take out the eight heads that look most at what
# came next last time, and for comparison eight others drawn at random:

# %%
order = np.argsort(-kinds["looks at what came next last time"].ravel())
copying, others = order[:8], rng.permutation(order[8:])[:8]
noise = rng.integers(1000, 40000, 12).tolist() * 2


def surprise(heads: np.ndarray) -> float:
    """Nats a token over the second half of the noise, without some heads."""
    places = [divmod(int(head), cfg.num_heads) for head in heads]
    found = interpret.alternatives(interpret.ablate(params, cfg, places), cfg, noise, 1)
    return -float(found.token_logprobs[12:].mean())


whole, without_copying, without_others = surprise([]), surprise(copying), surprise(others)
print(f"repeated noise: {whole:.1f} nats a token; without 8 copying heads {without_copying:.1f}, "
      f"without 8 others {without_others:.1f}")  # fmt: skip

# %% [markdown]
# ## 5. The key-value cache
#
# A model writes one token at a time. To choose the next one it needs the queries of the *last*
# position only, but the keys and values of *all* positions. Those of earlier positions do not
# change when a token is added, because nobody reads the future. So they are kept.
#
# Here is the loop without a memory, and with the simplest memory there is, on one layer:

# %%
tiny = Config.debug(num_layers=1)
weights_of_tiny = decoder.init(jax.random.key(0), tiny)
(layer_weights,) = weights_of_tiny.layers
stream = jnp.asarray(rng.normal(size=(1, 10, tiny.d_model)), jnp.float32)


def project(x: jax.Array) -> list[jax.Array]:
    """The stream of some tokens to their query, key and value (this layer's, without positions)."""
    shapes = [tiny.num_heads, tiny.num_kv_heads, tiny.num_kv_heads]
    maps_ = (layer_weights.q, layer_weights.k, layer_weights.v)
    return [
        decoder.linear(x, p).reshape(*x.shape[:2], n, tiny.head_dim)
        for p, n in zip(maps_, shapes, strict=True)
    ]


all_at_once, _ = attention.attend(*project(stream))
cached_keys, cached_values, one_by_one = [], [], []
for t in range(10):
    q, k, v = project(stream[:, t : t + 1])  # of one token
    cached_keys.append(k)
    cached_values.append(v)
    k, v = (jnp.concatenate(kept, axis=1) for kept in (cached_keys, cached_values))
    # The last row of causal attention sees everything; there are no other rows.
    padded = jnp.pad(q, ((0, 0), (t, 0), (0, 0), (0, 0)))
    one_by_one.append(attention.attend(padded, k, v)[0][:, -1:])
cached = jnp.concatenate(one_by_one, axis=1)
print(f"with a memory and without differ by less than 1e-5: "
      f"{float(jnp.abs(cached - all_at_once).max()) < 1e-5}")  # fmt: skip

# %% [markdown]
# The library's cache does not glue arrays together at each step: shapes would change, and every
# shape is a program to compile. It hands out *blocks* of 256 positions, and attention walks those
# that are filled, keeping a running maximum and a running sum (`cache.attend`). What does the
# memory cost, and what does it save?

# %%
per_token = cache.bytes_per_block(cfg, jnp.bfloat16) // cache.BLOCK_SIZE
print(f"SmolLM2 remembers {per_token / 1024:.1f} kB a token in bfloat16, "
      f"{per_token * cfg.max_seq_len / 2**20:.0f} MB for {cfg.max_seq_len:,} tokens")  # fmt: skip
kv_share = cfg.num_kv_heads / cfg.num_heads
print(f"{cfg.num_heads} query heads share {cfg.num_kv_heads} key heads: {kv_share:.0%} of what "
      "it would be if each had its own")  # fmt: skip

story = encoding.encode("Once upon a time, in a house by the sea, there lived")
cut = params.replace(layers=params.layers[:6])  # six layers are enough to see it, and quick
six = Config(**{**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__}, "num_layers": 6})


@jax.jit
def next_without_cache(weights, ids, length):
    """The likeliest next token, having read everything again."""
    logits, _ = decoder.forward(weights, six, ids)
    return logits[0, length - 1].argmax()


NEW, ROOM = 24, 256
buffer = np.zeros((1, ROOM), np.int32)
buffer[0, : len(story)] = story
next_without_cache(cut, buffer, len(story)).block_until_ready()  # compile
started = time.perf_counter()
for n in range(len(story), len(story) + NEW):
    buffer[0, n] = next_without_cache(cut, buffer, n)
slow = time.perf_counter() - started

greedy = generate.SamplingParams(temperature=0.0)
list(generate.generate(cut, six, story, max_new_tokens=2, sampling_params=greedy))  # compile
started = time.perf_counter()
generated = list(generate.generate(cut, six, story, max_new_tokens=NEW, sampling_params=greedy))
fast = time.perf_counter() - started
print(f"the same {NEW} tokens: {generated == buffer[0, len(story) : len(story) + NEW].tolist()}")
print(f"with the cache it took less than a third of the time: {fast < slow / 3}")

# %% [markdown]
# ## 6. What we have seen, as assertions

# %%
assert difference < 1e-6, "our attention is the library's"
assert max(along) < 1e-4, "rotated scores depend on distance only"
assert np.allclose(np.triu(maps[0, 0], 1), 0), "nobody reads the future"
assert kinds["looks at the token before"].max() > 0.5
assert kinds["looks at what came next last time"].max() > 0.2
assert without_copying > max(whole, without_others) + 1, "copying heads are missed"
assert float(jnp.abs(cached - all_at_once).max()) < 1e-5, "cache = no cache"
assert generated == buffer[0, len(story) : len(story) + NEW].tolist(), "the same tokens either way"
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** Which positions may position $t$ read if it sees at most `window` of them, its own among
# them (Mistral's sliding window)? Return the mask as a list of lists of booleans.


# %% tags=["stub"]
def window_mask(length: int, window: int) -> list[list[bool]]:
    """mask[t][s]: whether position t may read position s."""
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
# **2.** Softmax needs the largest score before it can begin, and the cache arrives in blocks. Keep
# a running maximum, a running sum and a running average instead: from the scores and values of
# each block, one number a position, compute the attention-weighted average over all of them,
# without ever holding more than one block.


# %% tags=["stub"]
def online_average(blocks: list[tuple[list[float], list[float]]]) -> float:
    """Blocks of (scores, values) to the softmax-weighted average of all values."""
    ...


checks.report(checks.online_average, online_average)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def online_average(blocks: list[tuple[list[float], list[float]]]) -> float:
#     largest, total, weighted = -np.inf, 0.0, 0.0
#     for scores, values in blocks:
#         now = max(largest, max(scores))
#         shrink = float(np.exp(largest - now))  # what was summed so far had a smaller maximum
#         weights = np.exp(np.array(scores) - now)
#         total = total * shrink + float(weights.sum())
#         weighted = weighted * shrink + float(weights @ np.array(values))
#         largest = now
#     return weighted / total
# ```
# </details>
#
# **3.** How many bytes does a cache need for `tokens` positions, if each of `layers` layers keeps a
# key and a value for each of `kv_heads` heads of `width` numbers, `bytes_each` bytes a number?


# %% tags=["stub"]
def cache_bytes(tokens: int, layers: int, kv_heads: int, width: int, bytes_each: int) -> int:
    """The size of a key-value cache."""
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
# Read next: `transformer/decoder.py`, where attention stands in its block, and
# `transformer/cache.py`, where the second exercise runs in XLA.
