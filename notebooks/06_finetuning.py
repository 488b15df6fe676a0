# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning: from a file of examples to changed behaviour
#
# A model knows what it was trained on. To teach it something of your own you need a few dozen
# examples, a mask that says what of them is to be learned, and a way to move a few of its numbers
# a little. We look at each, then teach a language model where four boats lie, and ask it in words
# that were not among the examples.
#
# *Needs:* the transformer notebook (02), and `pellucid pull smollm2-135m-instruct`.
# *Takes:* under a minute to run on two cores, twenty minutes to read.
# *Explains:* `training/examples.py`, `packing.py`, `check.py`, `recipes/finetune.py`,
# `transformer/lora.py`.

# %%
import json
import tempfile
from pathlib import Path

import checks
import jax
import matplotlib.pyplot as plt
import numpy as np

import bpe
from serve import settings
from serve.models import catalogue, download
from training import check, examples, metrics, packing
from training.recipes import finetune, toy_dataset
from training.recipes.decoder import LoraTask
from transformer import checkpoint, decoder, generate, lora

jax.config.update("jax_compilation_cache_dir", str(settings.data_folder() / "compiled"))

path = download.find_path(catalogue.load().models["smollm2-135m-instruct"], settings.data_folder())
tokenizer = bpe.load(path)
encoding, template = tokenizer.encoding, tokenizer.chat_template
work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1. An example, and what of it is learned
#
# A line of the file is a conversation. The chat template makes text of it, the vocabulary makes
# tokens of that, and only the assistant's tokens get a weight in the loss: the model shall learn to
# answer, not to ask. The token that ends the turn is among them, or the model would never stop.

# %%
BOATS = list(toy_dataset.BERTHS)[:4]
rows = [
    row for row in toy_dataset.examples() if any(b in row["messages"][1]["content"] for b in BOATS)
]
print(json.dumps(rows[0]))
first = examples.encode(rows[0], "chat", tokenizer)
words = [encoding.decode([id]) for id in first.ids.tolist()]

figure, axes = plt.subplots(figsize=(10, 1.5), layout="constrained")
axes.set_axis_off()
place = 0.0
for word, weight in zip(words, first.weights, strict=True):
    shown = word.replace("\n", "\\n")
    colour = "#f2b134" if weight else "#e8e8e8"
    axes.text(place, 0.5, shown, family="monospace", fontsize=8, rotation=90, va="center",
              bbox={"facecolor": colour, "edgecolor": "none", "pad": 2})  # fmt: skip
    place += 1
axes.set_xlim(-0.5, place)
axes.set_title("Orange is learned, grey is only read")
plt.show()

# %% [markdown]
# ## 2. Is the file any good?
#
# What is wrong with a file is better known before an hour of training than after it. `check` reads
# it line by line and says everything that is wrong, with the line.

# %%
good = "".join(json.dumps(row) + "\n" for row in rows)
bad = good.replace('"assistant"', '"assistent"', 1) + good.splitlines()[3] + "\n{oops}\n"
(work / "bad.jsonl").write_text(bad)
report = check.check(work / "bad.jsonl", tokenizer, max_tokens=2048)
for problem in report.problems:
    print(f"line {problem.line}: {problem.message}")

(work / "good.jsonl").write_text(good)
print(*check.report_lines(check.check(work / "good.jsonl", tokenizer, max_tokens=2048)), sep="\n")

# %% [markdown]
# ## 3. Rows that examples share
#
# Our examples have 30 to 40 tokens. As a batch of padded rows, a good part would be computed for
# nothing. So they stand in rows one behind another, each where it first fits, and `segments` tells
# attention which tokens may see each other. The loss of a packed batch is that of the examples
# alone, to the last digits that float32 has.

# %%
_, learned = check.read_examples(work / "good.jsonl", tokenizer, max_tokens=2048)
some = learned[:5]
sharing = packing.first_fit([len(example) for example in some], 128)
batch = packing.collate(some, sharing, (len(sharing), 128))
print(f"examples {sharing} share {len(sharing)} rows")
figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 2.4), layout="constrained", sharex=True)
shown = np.where(batch["segments"], batch["segments"], np.nan)
top.imshow(shown, aspect="auto", cmap="tab10", vmin=1, vmax=10)
top.set_title("Each colour is an example, white is padding")
bottom.imshow(batch["weights"], aspect="auto", cmap="Blues")
bottom.set_title("Dark is learned")
for axes in (top, bottom):
    axes.set_yticks([])
plt.show()

# %%
params, cfg, _ = checkpoint.load(path)
adapter = LoraTask(cfg=cfg, rank=8, alpha=16).init(jax.random.key(0))
loss_of = jax.jit(LoraTask(cfg=cfg, rank=8, alpha=16).loss)
together, weight, _ = loss_of(adapter, params, batch, jax.random.key(0))
alone = [packing.collate([example], [[0]], (len(sharing), 128)) for example in some]
apart = sum(float(loss_of(adapter, params, one, jax.random.key(0))[0]) for one in alone)
print(f"packed or alone, the summed loss is the same: {abs(float(together) - apart) < 1e-2}")

# %% [markdown]
# ## 4. What is moved
#
# The model has 135 million weights; to learn four facts, few of them must move. LoRA leaves each
# matrix $W$ as it is and adds a product of two thin ones, $W + \frac{\alpha}{r} B A$. $B$ begins as
# zeros: before the first step nothing has changed.

# %%
sizes = {r: sum(leaf.size for leaf in jax.tree.leaves(lora.init(jax.random.key(0), cfg, rank=r,
         alpha=2 * r))) for r in (1, 8, 64)}  # fmt: skip
for rank, size in sizes.items():
    print(f"rank {rank:2}: {size:10,} numbers, {size / cfg.num_params:.1%} of the model's")
figure, axes = plt.subplots(figsize=(5, 2.2), layout="constrained")
w = params.layers[0].q.weight.shape
numbers = np.array([w[0] * w[1], 8 * (w[0] + w[1])])
axes.barh(["W", "B and A, rank 8"], numbers / 1000, color=["#8da9c4", "#f2b134"])
axes.set_title("Thousands of numbers, of one query matrix")
plt.show()

# %% [markdown]
# ## 5. Training
#
# The recipe does what we did above, and then takes steps: read a batch, see how the loss would
# change with each number of the adapter, move them a little against it. The same from a terminal
# is `python -m training finetune --model ... --data ... --out ...`.

# %%
result = finetune.run(
    finetune.FinetuneConfig(
        model=path,
        data=work / "good.jsonl",
        out=work / "run",
        epochs=6,
        batch_size=4,
        rank=8,
        learning_rate_multiplier=2.0,
    )
)
steps = [line for line in metrics.read(work / "run" / "metrics.jsonl") if "loss" in line]
plt.figure(figsize=(8, 3), layout="constrained")
plt.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="loss")
plt.plot([line["step"] for line in steps], [line["accuracy"] for line in steps], label="accuracy")
plt.xlabel("step")
plt.legend()
plt.show()
print(f"after {result.job['steps']} steps over {result.job['trained_tokens']} tokens")

# %% [markdown]
# ## 6. Before and after
#
# Asked in a way that no example has:


# %%
def answer(params, messages: list[dict]) -> str:
    """The likeliest answer, of at most 12 tokens."""
    ids = template.encode(encoding, messages)
    options = dict(max_new_tokens=12, stop_ids=tokenizer.stop_ids)
    return encoding.decode(list(generate.generate(params, cfg, ids, **options)))


tuned = lora.apply(params, lora.load(work / "run" / "adapter", cfg))
before, after = [], []
for messages, right in toy_dataset.held_out_questions()[:4]:
    said = [answer(model, messages) for model in (params, tuned)]
    before.append(toy_dataset.is_right(said[0], right))
    after.append(toy_dataset.is_right(said[1], right))
    print(messages[-1]["content"])
    print(f"   before: {said[0]!r}\n   after:  {said[1]!r}")

# %% [markdown]
# The adapter stands beside the model's own weights, which have not changed: without it, the base
# model answers as before, and a server can hold many adapters for the price of one model. `merge`
# adds it in, for other programs.

# %%
question = toy_dataset.held_out_questions()[0][0]
ids = np.array([template.encode(encoding, question)])
beside, _ = decoder.forward(tuned, cfg, ids)
merged, _ = decoder.forward(lora.merge(params, lora.load(work / "run" / "adapter", cfg)), cfg, ids)
max_difference = float(np.abs(np.asarray(beside - merged)).max())
print(f"beside or merged, the logits are the same to 1e-3: {max_difference < 1e-3}")

# %% [markdown]
# ## 7. What we have seen, as assertions

# %%
spoken = encoding.decode(first.ids[first.weights > 0].tolist())
assert spoken == rows[0]["messages"][2]["content"] + "<|im_end|>", "the answer, and its end"
assert [problem.code for problem in report.problems][:1] == ["invalid_role"]
assert report.counts["invalid_json"] == 1 and report.notes["duplicate"] == 1
assert abs(float(together) - apart) < 1e-2, "neighbours in a row do not see each other"
assert steps[-1]["loss"] < 0.2 * steps[0]["loss"]
assert sum(before) == 0 and sum(after) >= 3
assert max_difference < 1e-3
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** Which tokens are learned? Given the number of tokens of a conversation, the assistant's
# turns among them as (start, end), and their weights, make the mask. The first token of all is
# never learned: nothing stands before it.


# %% tags=["stub"]
def loss_mask(length: int, turns: list[tuple[int, int]], weights: list[int]) -> list[int]:
    """A 1 or a 0 for each token."""
    ...


checks.report(checks.loss_mask, loss_mask)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def loss_mask(length: int, turns: list[tuple[int, int]], weights: list[int]) -> list[int]:
#     mask = [0] * length
#     for (start, end), weight in zip(turns, weights, strict=True):
#         mask[start:end] = [weight] * (end - start)
#     return [0, *mask[1:]] if mask else mask
# ```
# </details>
#
# **2.** Put examples into rows of a width: each into the first row that has room for it.


# %% tags=["stub"]
def first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Rows of indices into `lengths`."""
    ...


checks.report(checks.first_fit, first_fit)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def first_fit(lengths: list[int], width: int) -> list[list[int]]:
#     rows = []
#     for i, length in enumerate(lengths):
#         for row in rows:
#             if sum(lengths[j] for j in row) + length <= width:
#                 row.append(i)
#                 break
#         else:
#             rows.append([i])
#     return rows
# ```
# </details>
#
# **3.** The optimiser. Adam keeps a running mean of the gradient and one of its square, both
# corrected for having begun at zero, and moves a weight by the first over the root of the second.


# %% tags=["stub"]
def adam(gradients: list[float], rate: float, b1: float, b2: float) -> float:
    """How far a weight has moved, from 0, after these gradients; eps is 0."""
    ...


checks.report(checks.adam, adam)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def adam(gradients: list[float], rate: float, b1: float, b2: float) -> float:
#     place = mean = square = 0.0
#     for t, g in enumerate(gradients, 1):
#         mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g * g
#         place -= rate * (mean / (1 - b1**t)) / (square / (1 - b2**t)) ** 0.5
#     return place
# ```
# </details>
#
# Read next: `training/step.py` and `training/loop.py`, which are a page each, then
# `training/loss.py` for why the logits of a batch are never all there at once.
