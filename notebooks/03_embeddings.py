# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Embeddings: search, classify and compare texts
#
# An encoder maps a text to a vector of 384 numbers, such that texts with similar meanings have
# similar vectors. The vectors have three main uses: search, classification and comparison. We
# compute vectors, check the computation, and then do all three.
#
# *Needs:* a little linear algebra, and `pellucid pull all-minilm-l6-v2`.
# *Takes:* half a minute to run, twenty minutes to read.
# *Explains:* `transformer/encoder.py`, `transformer/packing.py`, `transformer/similarity.py`.

# %%
import checks
import jax
import matplotlib.pyplot as plt
import numpy as np

import bpe
from serve import settings
from serve.models import catalogue, download
from transformer import encoder, packing, similarity
from transformer.checkpoint import bert

jax.config.update("jax_compilation_cache_dir", str(settings.data_folder() / "compiled"))

folder = download.find_path(catalogue.load().models["all-minilm-l6-v2"], settings.data_folder())
params, cfg = bert.load(folder)
tokenizer = bpe.load_wordpiece(folder)


def embed(texts: list[str]) -> np.ndarray:
    """Return a vector of length 1 for each text: float32 [n, 384]."""
    return encoder.embed_all(params, cfg, tokenizer.encode_batch(texts, max_length=cfg.max_tokens))


# %% [markdown]
# ## 1. From text to vector
#
# WordPiece splits the text into tokens, between `[CLS]` and `[SEP]`. After six layers, the vector
# of each token depends on the complete text. The average of the token vectors, scaled to length 1,
# is the vector of the text.

# %%
TEXT = "Unbelievably tasty hamburgers!"
ids = tokenizer.encode(TEXT)
print(tokenizer.convert_ids_to_tokens(ids))
ones = np.ones((1, len(ids)), np.int32)
x, _ = encoder.forward(params, cfg, np.array([ids], np.int32), ones)  # [1, T, D]
mean = np.asarray(x[0].mean(0))
by_hand = mean / np.linalg.norm(mean)
print(f"the average agrees with the library to 1e-5: "
      f"{np.abs(by_hand - embed([TEXT])[0]).max() < 1e-5}")  # fmt: skip

# %% [markdown]
# Unlike in a decoder, every token reads all other tokens, without a causal mask. But texts of
# different lengths would need padding in a batch. Therefore several texts share a row, and a mask
# separates them (`packing.py`):

# %%
lengths = np.random.default_rng(0).integers(5, 120, 60)
(batch, *_) = packing.pack([[1] * int(n) for n in lengths], 256)
batches = list(packing.pack([[1] * int(n) for n in lengths], 256))
packed = sum(b.ids.size for b in batches)
padded = len(lengths) * lengths.max()
print(f"{lengths.sum()} tokens: {packed} positions when packed, {padded} when padded")
plt.figure(figsize=(9, 1.8), layout="constrained")
plt.imshow(np.where(batch.segments, batch.segments % 9 + 1, 0), aspect="auto", cmap="tab10")
plt.title("Rows of a batch; each color is a text")
plt.yticks([])
plt.show()

# %% [markdown]
# ## 2. Search
#
# Here are twenty sentences of an imaginary manual. A question can match its answer without common
# words: the query is also embedded, and the nearest sentences are returned. For up to a few million
# vectors, comparing the query with all of them is fast enough, and exact.

# %%
HANDBOOK = """
Hold the power button for ten seconds to restart the device.
The battery lasts about nine hours on a full charge.
Use only the supplied cable to fill the battery.
Wipe the screen with a soft, dry cloth.
Photographs are stored in the gallery folder.
To connect to the internet, choose a network and enter its password.
The loudspeaker can be silenced with the switch on the left edge.
Do not use the device under water.
Your purchase may be sent back within thirty days.
Repairs are free of charge for two years after purchase.
The alarm clock rings even if the sound is off.
Text can be made larger in the display settings.
Emergency calls are possible without a card.
Two cards can be used at the same time.
The camera focuses on faces by itself.
Apps can be removed by holding a finger on their symbol.
A lost device can be found with another one of yours.
In the dark, the night mode is easier on the eyes.
Spoken words can be written down automatically.
Parents can limit the hours of use.
""".strip().splitlines()
vectors = embed(HANDBOOK)

QUESTIONS = ["It froze, what now?", "Can I get my money back?", "How do I get Wi-Fi?"]
results = similarity.nearest(embed(QUESTIONS), vectors, 2)
for question, scores, indices in zip(QUESTIONS, results.scores, results.indices, strict=True):
    print(question)
    for score, index in zip(scores, indices, strict=True):
        print(f"   {score:.2f}  {HANDBOOK[index]}")

# %% [markdown]
# ## 3. Zero-shot classification
#
# If the labels are meaningful words, their vectors form a classifier without any examples: each
# text gets the nearest label.

# %%
TOPICS = {
    "sport": ["The striker scored twice in the second half.", "She broke the marathon record.",
              "The coach changed the line-up before the match.", "He served an ace to win the set.",
              "Their goalkeeper saved a penalty."],
    "cooking": ["Simmer the sauce for ten minutes.", "Add a pinch of salt to the dough.",
                "Roast the vegetables until golden.", "Whisk the eggs with sugar.",
                "Let the bread rise overnight."],
    "space": ["The probe entered orbit around Saturn.", "Astronomers found a new planet.",
              "The rocket's second stage failed to ignite.", "A comet will pass the Earth in May.",
              "The crew repaired the telescope in orbit."],
}  # fmt: skip
labels = list(TOPICS)
texts = [text for group in TOPICS.values() for text in group]
truth = np.repeat(np.arange(len(labels)), [len(group) for group in TOPICS.values()])
points = embed(texts)
probs = similarity.zero_shot(points, embed([f"This is about {label}." for label in labels]))
zero_shot_accuracy = float((np.asarray(probs).argmax(1) == truth).mean())
print(f"zero-shot accuracy: {zero_shot_accuracy:.0%}")

# %% [markdown]
# ## 4. Classification with examples
#
# With examples, a linear classifier on the vectors is sufficient. The *probe* is a logistic
# regression. It is trained on three examples of each topic, and tested on the other two:

# %%
is_example = np.tile([True, True, True, False, False], len(labels))
probe = similarity.fit_probe(points[is_example], truth[is_example], len(labels))
predicted = np.asarray(similarity.predict(probe, points[~is_example]))
probe_accuracy = float((predicted.argmax(1) == truth[~is_example]).mean())
print(f"accuracy of the probe on the test sentences: {probe_accuracy:.0%}")
sentences = [
    "The knife must be sharp.",
    "The keeper was sharp today.",
    "No weight is hard on bones.",
]
for sentence, row in zip(sentences, similarity.predict(probe, embed(sentences)), strict=True):
    print(f"{sentence:32}", *(f"{label} {p:.0%}" for label, p in zip(labels, row, strict=True)))

# %% [markdown]
# ## 5. Comparison
#
# The matrix of all cosines shows which sentences are similar. `cluster` finds groups of similar
# sentences without any labels.

# %%
cosines = np.asarray(similarity.cosine(points, points))
groups = similarity.cluster(jax.random.key(0), points, 3)
counts = np.zeros((3, 3), int)
np.add.at(counts, (np.asarray(groups.labels), truth), 1)
purity = counts.max(1).sum() / len(texts)
print(counts, "clusters by topics;", f"{purity:.0%} belong to the main topic of their cluster")
centered = points - points.mean(0)
projected = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T  # PCA
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
figure.colorbar(left.imshow(cosines, cmap="Blues", vmin=0, vmax=1), label="cosine", shrink=0.8)
left.set_yticks([2, 7, 12], labels, rotation=90, va="center")
left.set_xticks([])
left.set_title("Cosines of all pairs of sentences")
colors = np.array(["#3b6ea5", "#c8553d", "#588157"])
right.scatter(*projected.T, c=colors[np.asarray(groups.labels)])
for point, topic in zip(projected, truth, strict=True):
    right.annotate(labels[topic], point, fontsize=8, xytext=(4, 3), textcoords="offset points")
right.set_title("Colors: clusters; labels: topics")
right.set_axis_off()
plt.show()

# %% [markdown]
# ## 6. Lower precision and fewer dimensions
#
# Processors multiply bfloat16 numbers (8 bits of precision instead of 24) several times as fast.
# The vectors hardly change. Truncating vectors to fewer dimensions has a larger effect, because
# this model, unlike some others, was not trained for it.

# %%
bf16_params, _ = bert.load(folder, dtype="bfloat16")
bf16_points = encoder.embed_all(bf16_params, cfg, tokenizer.encode_batch(texts))
lowest_cosine = float((bf16_points * points).sum(1).min())
print(f"bfloat16: every cosine with float32 is above 0.9999: {lowest_cosine > 0.9999}")
for width in (384, 192, 96, 24):
    nearest = similarity.nearest(points[:, :width], points[:, :width], 2).indices[:, 1]
    share = float((truth[np.asarray(nearest)] == truth).mean())
    print(f"{width:4} dimensions: the nearest sentence has the same topic for {share:.0%}")

# %% [markdown]
# ## 7. Summary, as assertions

# %%
assert np.abs(by_hand - embed([TEXT])[0]).max() < 1e-5, "the vector is the normalized average"
assert packed < 1.2 * lengths.sum(), "packed rows contain little padding"
assert HANDBOOK[results.indices[0, 0]].startswith("Hold the power button")
assert "sent back" in HANDBOOK[results.indices[1, 0]]
assert "internet" in HANDBOOK[results.indices[2, 0]]
assert zero_shot_accuracy > 0.9 and probe_accuracy > 0.8
assert purity > 0.8, "most sentences of a cluster have the same topic"
assert lowest_cosine > 0.9999
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** Compute the cosine similarity.


# %% tags=["stub"]
def cosine(a: list[float], b: list[float]) -> float:
    """Return the cosine of the angle between two vectors; 0 if either is zero."""
    ...


checks.report(checks.cosine, cosine)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cosine(a: list[float], b: list[float]) -> float:
#     dot = sum(x * y for x, y in zip(a, b, strict=True))
#     norms = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
#     return dot / norms if norms else 0.0
# ```
# </details>
#
# **2.** A batch has rows of token vectors, and a mask that is 0 for padding. Average the token
# vectors of each row without the padding.


# %% tags=["stub"]
def mean_pool(rows: list[list[list[float]]], mask: list[list[int]]) -> list[list[float]]:
    """Return the means [B][D] of rows [B][T][D] with a mask [B][T]."""
    ...


checks.report(checks.mean_pool, mean_pool)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mean_pool(rows: list[list[list[float]]], mask: list[list[int]]) -> list[list[float]]:
#     x, m = np.array(rows, float), np.array(mask, float)[..., None]
#     return ((x * m).sum(1) / m.sum(1)).tolist()
# ```
# </details>
#
# **3.** A measure of search quality is *recall at k*: the share of queries whose correct answer is
# among the first k results.


# %% tags=["stub"]
def recall(results: list[list[int]], answers: list[int], k: int) -> float:
    """Return recall at k; results[q] are ranked indices, answers[q] is the correct index."""
    ...


checks.report(checks.recall, recall)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def recall(results: list[list[int]], answers: list[int], k: int) -> float:
#     hits = [answer in row[:k] for row, answer in zip(results, answers, strict=True)]
#     return sum(hits) / len(hits)
# ```
# </details>
#
# Read next: `transformer/encoder.py`, then `serve/api/routes/embeddings.py` for the HTTP endpoint.
