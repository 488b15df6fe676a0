# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning: from a file of examples to changed behavior
#
# A model knows only what was in its training data. To teach it new facts, you need a few dozen
# examples, a mask of the tokens to learn, and a method to change a small number of weights. We look
# at each, then teach a language model the berths of four boats, and ask questions that are not
# among the examples.
#
# *Needs:* the attention notebook (02), and `pellucid pull smollm2-135m-instruct`.
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
# ## 1. An example and its loss mask
#
# Each line of the file is a conversation. The chat template converts it to text, and the tokenizer
# to tokens. Only the tokens of the assistant have a weight in the loss: the model learns to answer,
# not to ask. They include the token that ends the message, so that the model learns to stop.

# %%
BOATS = list(toy_dataset.BERTHS)[:4]
rows = [
    row for row in toy_dataset.examples() if any(b in row["messages"][1]["content"] for b in BOATS)
]
print(json.dumps(rows[0]))
first = examples.encode(rows[0], "chat", tokenizer)
tokens = [encoding.decode([id]) for id in first.ids.tolist()]

figure, axes = plt.subplots(figsize=(10, 1.5), layout="constrained")
axes.set_axis_off()
for i, (token, weight) in enumerate(zip(tokens, first.weights, strict=True)):
    color = "#f2b134" if weight else "#e8e8e8"
    axes.text(i, 0.5, token.replace("\n", "\\n"), family="monospace", fontsize=8, rotation=90,
              va="center", bbox={"facecolor": color, "edgecolor": "none", "pad": 2})  # fmt: skip
axes.set_xlim(-0.5, len(tokens))
axes.set_title("Orange tokens are learned, gray tokens are input only")
plt.show()

# %% [markdown]
# ## 2. Check the file
#
# Errors in a file should be found before training. `check` reads the file line by line and reports
# all problems with their lines.

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
# ## 3. Packed batches
#
# Our examples have 30 to 40 tokens. In a batch of padded rows, much of the computation would be
# wasted. So the examples are packed: each is placed in the first row with enough space, and
# `segments` defines which tokens can attend to each other. The loss of a packed batch equals the
# sum over the separate examples, up to rounding.

# %%
_, all_examples = check.read_examples(work / "good.jsonl", tokenizer, max_tokens=2048)
few_examples = all_examples[:5]
bins = packing.first_fit([len(example) for example in few_examples], 128)
batch = packing.collate(few_examples, bins, (len(bins), 128))
print(f"examples {bins} share {len(bins)} rows")
figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 2.4), layout="constrained", sharex=True)
segments = np.where(batch["segments"], batch["segments"], np.nan)
top.imshow(segments, aspect="auto", cmap="tab10", vmin=1, vmax=10)
top.set_title("Each color is an example, white is padding")
bottom.imshow(batch["weights"], aspect="auto", cmap="Blues")
bottom.set_title("Dark tokens are learned")
for axes in (top, bottom):
    axes.set_yticks([])
plt.show()

# %%
params, cfg, _ = checkpoint.load(path)
adapter = LoraTask(cfg=cfg, rank=8, alpha=16).init(jax.random.key(0))
compute_loss = jax.jit(LoraTask(cfg=cfg, rank=8, alpha=16).loss)
packed_loss, weight, _ = compute_loss(adapter, params, batch, jax.random.key(0))
singles = [packing.collate([example], [[0]], (len(bins), 128)) for example in few_examples]
separate_loss = sum(
    float(compute_loss(adapter, params, single, jax.random.key(0))[0]) for single in singles
)
is_same = abs(float(packed_loss) - separate_loss) < 1e-2
print(f"packed and separate examples have the same total loss: {is_same}")

# %% [markdown]
# ## 4. Low-rank adapters
#
# The model has 135 million weights, but few parameters suffice to learn four facts. LoRA does not
# change the matrices $W$. It adds a product of two small matrices, $W + \frac{\alpha}{r} B A$. $B$
# is initialized with zeros, so the model does not change before the first step.

# %%
sizes = {r: sum(leaf.size for leaf in jax.tree.leaves(lora.init(jax.random.key(0), cfg, rank=r,
         alpha=2 * r))) for r in (1, 8, 64)}  # fmt: skip
for rank, size in sizes.items():
    print(f"rank {rank:2}: {size:10,} parameters, {size / cfg.num_params:.1%} of the model")
figure, axes = plt.subplots(figsize=(5, 2.2), layout="constrained")
w = params.layers[0].q.weight.shape
numbers = np.array([w[0] * w[1], 8 * (w[0] + w[1])])
axes.barh(["W", "B and A, rank 8"], numbers / 1000, color=["#8da9c4", "#f2b134"])
axes.set_title("Thousands of parameters, for one query matrix")
plt.show()

# %% [markdown]
# ## 5. Training
#
# The recipe performs the steps above, and then trains: read a batch, compute the gradient of the
# loss with respect to the adapter, and update the adapter. The same on the command line:
# `python -m training finetune --model ... --data ... --out ...`.

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
# We ask questions that are worded differently from all examples:


# %%
def answer(params, messages: list[dict]) -> str:
    """Return the most likely answer, of at most 12 tokens."""
    ids = template.encode(encoding, messages)
    options = dict(max_new_tokens=12, stop_ids=tokenizer.stop_ids)
    return encoding.decode(list(generate.generate(params, cfg, ids, **options)))


tuned = lora.apply(params, lora.load(work / "run" / "adapter", cfg))
before, after = [], []
for messages, expected in toy_dataset.held_out_questions()[:4]:
    base_answer, tuned_answer = (answer(model, messages) for model in (params, tuned))
    before.append(toy_dataset.is_right(base_answer, expected))
    after.append(toy_dataset.is_right(tuned_answer, expected))
    print(messages[-1]["content"])
    print(f"   before: {base_answer!r}\n   after:  {tuned_answer!r}")

# %% [markdown]
# The adapter is separate from the weights of the model, which have not changed. Without the
# adapter, the base model answers as before, and a server can load many adapters for one base model.
# `merge` adds the adapter to the weights, for use in other programs.

# %%
question = toy_dataset.held_out_questions()[0][0]
ids = np.array([template.encode(encoding, question)])
separate, _ = decoder.forward(tuned, cfg, ids)
merged, _ = decoder.forward(lora.merge(params, lora.load(work / "run" / "adapter", cfg)), cfg, ids)
max_difference = float(np.abs(np.asarray(separate - merged)).max())
print(f"logits with a separate and a merged adapter are equal to 1e-3: {max_difference < 1e-3}")

# %% [markdown]
# ## 7. Summary, as assertions

# %%
learned_text = encoding.decode(first.ids[first.weights > 0].tolist())
assert learned_text == rows[0]["messages"][2]["content"] + "<|im_end|>", "the answer, and its end"
assert [problem.code for problem in report.problems][:1] == ["invalid_role"]
assert report.counts["invalid_json"] == 1 and report.notes["duplicate"] == 1
assert abs(float(packed_loss) - separate_loss) < 1e-2, "examples in a row are independent"
assert steps[-1]["loss"] < 0.2 * steps[0]["loss"]
assert sum(before) == 0 and sum(after) >= 3
assert max_difference < 1e-3
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** Compute the loss mask from the number of tokens of a conversation, the spans of the
# assistant's messages as (start, end), and their weights. The first token of a conversation is
# never learned, because no token precedes it.


# %% tags=["stub"]
def loss_mask(length: int, spans: list[tuple[int, int]], weights: list[int]) -> list[int]:
    """Return a 1 or a 0 for each token."""
    ...


checks.report(checks.loss_mask, loss_mask)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def loss_mask(length: int, spans: list[tuple[int, int]], weights: list[int]) -> list[int]:
#     mask = [0] * length
#     for (start, end), weight in zip(spans, weights, strict=True):
#         mask[start:end] = [weight] * (end - start)
#     return [0, *mask[1:]] if mask else mask
# ```
# </details>
#
# **2.** Pack examples into rows of a given width: place each in the first row with enough space.


# %% tags=["stub"]
def first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Return rows of indices into `lengths`."""
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
# **3.** The optimizer Adam keeps running means of the gradient and of its square, both corrected
# for their initial value of zero. It changes a weight by the first divided by the root of the
# second.


# %% tags=["stub"]
def adam(gradients: list[float], rate: float, b1: float, b2: float) -> float:
    """Return a weight, initially 0, after updates with these gradients; eps is 0."""
    ...


checks.report(checks.adam, adam)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def adam(gradients: list[float], rate: float, b1: float, b2: float) -> float:
#     x = mean = square = 0.0
#     for t, g in enumerate(gradients, 1):
#         mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g * g
#         x -= rate * (mean / (1 - b1**t)) / (square / (1 - b2**t)) ** 0.5
#     return x
# ```
# </details>
#
# Read next: `training/step.py` and `training/loop.py`, which are short, then `training/loss.py`
# about computing the loss without storing all logits of a batch.
