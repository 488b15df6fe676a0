# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Embeddings: finding, sorting and comparing texts
#
# An encoder reads a whole text and gives it a place in a space of 384 dimensions, so that texts
# that mean alike stand near each other. That one trick serves three uses: search, classification
# and comparison. We make the vectors, check how they come about, and then do all three.
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
words = bpe.load_wordpiece(folder)


def embed(texts: list[str]) -> np.ndarray:
    """A vector of length 1 for each text: float32 [n, 384]."""
    return encoder.embed_all(params, cfg, words.encode_batch(texts, max_length=cfg.max_tokens))


# %% [markdown]
# ## 1. From text to vector
#
# WordPiece cuts the text, `[CLS]` and `[SEP]` stand around it, and after six layers each token has
# a vector that knows the whole text. Their average, scaled to length 1, is the text's vector.

# %%
TEXT = "Unbelievably tasty hamburgers!"
ids = words.encode(TEXT)
print(words.convert_ids_to_tokens(ids))
ones = np.ones((1, len(ids)), np.int32)
x, _ = encoder.forward(params, cfg, np.array([ids], np.int32), ones)  # [1, T, D]
mean = np.asarray(x[0].mean(0))
by_hand = mean / np.linalg.norm(mean)
print(f"the average is what the library says, to 1e-5: "
      f"{np.abs(by_hand - embed([TEXT])[0]).max() < 1e-5}")  # fmt: skip

# %% [markdown]
# Unlike in a decoder every token reads every other, before and behind: there is no mask. But texts
# of many lengths would leave holes in a batch, so several share a row, and *then* a mask keeps them
# apart (`packing.py`):

# %%
lengths = np.random.default_rng(0).integers(5, 120, 60)
(batch, *_) = packing.pack([[1] * int(n) for n in lengths], 256)
every = list(packing.pack([[1] * int(n) for n in lengths], 256))
packed = sum(b.ids.size for b in every)
padded = len(lengths) * lengths.max()
print(f"{lengths.sum()} tokens: {packed} computed when packed, {padded} when padded")
plt.figure(figsize=(9, 1.8), layout="constrained")
plt.imshow(np.where(batch.segments, batch.segments % 9 + 1, 0), aspect="auto", cmap="tab10")
plt.title("Rows of a batch; each colour is a text")
plt.yticks([])
plt.show()

# %% [markdown]
# ## 2. Search
#
# Here are twenty sentences of an imaginary handbook. A question finds its answer without sharing a
# word with it: the query is embedded too, and the nearest sentences win. For some millions of
# vectors comparing with all of them is quick enough, and exact.

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
found = similarity.nearest(embed(QUESTIONS), vectors, 2)
for question, scores, places in zip(QUESTIONS, found.scores, found.indices, strict=True):
    print(question)
    for score, place in zip(scores, places, strict=True):
        print(f"   {score:.2f}  {HANDBOOK[place]}")

# %% [markdown]
# ## 3. Classification without an example
#
# If the labels say something, their own vectors are a classifier: each text gets the nearest label.

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
chances = similarity.zero_shot(points, embed([f"This is about {label}." for label in labels]))
zero_shot_right = float((np.asarray(chances).argmax(1) == truth).mean())
print(f"{zero_shot_right:.0%} right without an example")

# %% [markdown]
# ## 4. Classification from examples
#
# With examples, a straight line is enough: the encoder has done the hard part. The *probe* is
# logistic regression on the vectors. Three examples of each topic, and tested on the other two:

# %%
is_example = np.tile([True, True, True, False, False], len(labels))
probe = similarity.fit_probe(points[is_example], truth[is_example], len(labels))
guessed = np.asarray(similarity.predict(probe, points[~is_example]))
probe_right = float((guessed.argmax(1) == truth[~is_example]).mean())
print(f"{probe_right:.0%} right on what it has not seen")
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
# All cosines at once are a picture of what is alike. `cluster` finds the groups without being told
# that there are topics.

# %%
alike = np.asarray(similarity.cosine(points, points))
groups = similarity.cluster(jax.random.key(0), points, 3)
counts = np.zeros((3, 3), int)
np.add.at(counts, (np.asarray(groups.labels), truth), 1)
purity = counts.max(1).sum() / len(texts)
print(counts, "clusters by topics;", f"{purity:.0%} stand with the most of their cluster")
mapped = points - points.mean(0)
flat = mapped @ np.linalg.svd(mapped, full_matrices=False)[2][:2].T  # the two widest directions
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
figure.colorbar(left.imshow(alike, cmap="Blues", vmin=0, vmax=1), label="cosine", shrink=0.8)
left.set_yticks([2, 7, 12], labels, rotation=90, va="center")
left.set_xticks([])
left.set_title("Every sentence with every other")
colours = np.array(["#3b6ea5", "#c8553d", "#588157"])
right.scatter(*flat.T, c=colours[np.asarray(groups.labels)])
for spot, number in zip(flat, truth, strict=True):
    right.annotate(labels[number], spot, fontsize=8, xytext=(4, 3), textcoords="offset points")
right.set_title("Colours: clusters; words: topics")
right.set_axis_off()
plt.show()

# %% [markdown]
# ## 6. How narrow may the numbers be?
#
# Processors multiply bfloat16 (8 bits of fraction instead of 24) several times as fast. The vectors
# hardly move. Cutting a vector off is another matter: models trained for it keep their meaning,
# this one was not.

# %%
narrow, _ = bert.load(folder, dtype="bfloat16")
other = encoder.embed_all(narrow, cfg, words.encode_batch(texts))
worst = float((other * points).sum(1).min())
print(f"bfloat16: every cosine with float32 is above 0.9999: {worst > 0.9999}")
for width in (384, 192, 96, 24):
    near = similarity.nearest(points[:, :width], points[:, :width], 2).indices[:, 1]
    same = float((truth[np.asarray(near)] == truth).mean())
    print(f"{width:4} numbers: the nearest other sentence is of the same topic for {same:.0%}")

# %% [markdown]
# ## 7. What we have seen, as assertions

# %%
assert np.abs(by_hand - embed([TEXT])[0]).max() < 1e-5, "the vector is the average, normalised"
assert packed < 1.2 * lengths.sum(), "packed rows hold little padding"
assert HANDBOOK[found.indices[0, 0]].startswith("Hold the power button")
assert "sent back" in HANDBOOK[found.indices[1, 0]]
assert "internet" in HANDBOOK[found.indices[2, 0]]
assert zero_shot_right > 0.9 and probe_right > 0.8
assert purity > 0.8, "most of a cluster is of one topic"
assert worst > 0.9999
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** Cosine similarity by hand.


# %% tags=["stub"]
def cosine(a: list[float], b: list[float]) -> float:
    """The cosine of the angle between two vectors; 0 if either is zero."""
    ...


checks.report(checks.cosine, cosine)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cosine(a: list[float], b: list[float]) -> float:
#     dot = sum(x * y for x, y in zip(a, b, strict=True))
#     size = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
#     return dot / size if size else 0.0
# ```
# </details>
#
# **2.** A batch holds rows of token vectors, and a mask that says which tokens are there. Average
# those that are.


# %% tags=["stub"]
def mean_pool(rows: list[list[list[float]]], mask: list[list[int]]) -> list[list[float]]:
    """[B][T][D] and [B][T] -> [B][D]."""
    ...


checks.report(checks.mean_pool, mean_pool)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mean_pool(rows: list[list[list[float]]], mask: list[list[int]]) -> list[list[float]]:
#     x, there = np.array(rows, float), np.array(mask, float)[..., None]
#     return ((x * there).sum(1) / there.sum(1)).tolist()
# ```
# </details>
#
# **3.** How good is a search? *Recall at k* is the share of queries whose right answer is among the
# first k found.


# %% tags=["stub"]
def recall(found: list[list[int]], right: list[int], k: int) -> float:
    """found[q]: places in the order found; right[q]: the one that should be."""
    ...


checks.report(checks.recall, recall)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def recall(found: list[list[int]], right: list[int], k: int) -> float:
#     return sum(place in row[:k] for row, place in zip(found, right, strict=True)) / len(right)
# ```
# </details>
#
# Read next: `transformer/encoder.py`, then `serve/api/routes/embeddings.py` for the same over HTTP.
