# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: from text to tokens to chances, and back to text
#
# We start a server, ask it with OpenAI's own client, watch an answer arrive, turn the temperature,
# and look at what the model saw and what it could have said. At the end we do without the server:
# the same numbers from `transformer` directly.
#
# *Needs:* a little Python, and the default model (`pellucid pull`; nothing else is fetched).
# *Takes:* half a minute to run, a quarter of an hour to read.
# *Explains:* `bpe/encoding.py`, `transformer/generate.py`, `transformer/sampling.py`.

# %%
import html
import json
import subprocess
import sys

import checks
import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from openai import OpenAI

import bpe
from serve import settings
from serve.models import catalogue, download
from transformer import checkpoint, decoder
from transformer.generate import generate
from transformer.sampling import SamplingParams

# Compiled programs are kept where the server keeps its own: the second run need not compile them.
jax.config.update("jax_compilation_cache_dir", str(settings.data_folder() / "compiled"))

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

# %% [markdown]
# ## 1. Start, and ask
#
# `pellucid serve` is what `make serve` runs. Here we start it as a process of its own on any free
# port; with `--json` it prints its address as soon as it listens. `--dtype float32` skips the
# choice of the fastest number format, and lets us compare with our own computation below.

# %%
server = subprocess.Popen(
    [sys.executable, "-m", "serve", "serve", "--port", "0", "--dtype", "float32", "--json"],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
)
ready = json.loads(server.stdout.readline())
client = OpenAI(base_url=f"{ready['url']}/v1", api_key="any")

answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
print(answer.choices[0].message.content)
print(answer.usage.prompt_tokens, "tokens read,", answer.usage.completion_tokens, "written")

# %% [markdown]
# Code written for OpenAI asks for one of OpenAI's models. Such a name leads to a local model, and
# the reply says to which:

# %%
aliased = client.chat.completions.create(model="gpt-4o-mini", messages=QUESTION, temperature=0)
print(aliased.model, "says:", aliased.choices[0].message.content)

# %% [markdown]
# ## 2. Stream
#
# A model writes one token at a time, so there is no need to wait for the last. Between the bars is
# what each event brought. A token is often a word with the space in front of it.

# %%
stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
pieces = [event.choices[0].delta.content or "" for event in stream]
print("|".join(piece for piece in pieces if piece))

# %% [markdown]
# ## 3. Temperature and seed
#
# At temperature 0 the likeliest token is taken, always. Above it a die is thrown: the higher the
# temperature, the more evenly the chances are spread before the throw. The seed fixes the die.

# %%
STORY = [{"role": "user", "content": "Write a sentence about the sea."}]


def say(temperature: float, seed: int) -> str:
    """One answer of at most 16 tokens, on one line."""
    reply = client.chat.completions.create(
        model=MODEL, messages=STORY, temperature=temperature, top_p=1, seed=seed, max_tokens=16
    )
    return " ".join(reply.choices[0].message.content.split())


for temperature in (0, 0.7, 1.5):
    for seed in (1, 2):
        print(f"temperature {temperature:<4} seed {seed}: {say(temperature, seed)}")
print(f"temperature 0.7  seed 1: {say(0.7, 1)} (once more)")

# %% [markdown]
# Change something, and say beforehand what you expect: another temperature, `top_p=0.5`, another
# question.

# %% [markdown]
# ## 4. What the model reads: tokens
#
# Before anything else, text is cut into *tokens*, pieces that occurred often in the text the
# vocabulary was made from. Each has a number, its id. Frequent words are one token, rare ones
# several, and the space belongs to the word behind it.


# %%
class Tokens:
    """Tokens as coloured boxes with their ids; as plain text where there are no colours."""

    def __init__(self, encoding: bpe.Encoding, ids: list[int]):
        self.pieces = [
            encoding.decode_single_token_bytes(i).decode("utf-8", "replace") for i in ids
        ]
        self.ids = ids

    def __repr__(self) -> str:
        return "|".join(self.pieces) + "\n" + " ".join(map(str, self.ids))

    def _repr_html_(self) -> str:
        colours = ("#cfe3ff", "#ffe3c2", "#d3f2d3", "#f6d5ee", "#fff3b0")
        boxes = []
        for n, (piece, id) in enumerate(zip(self.pieces, self.ids, strict=True)):
            text = html.escape(piece).replace(" ", "&middot;").replace("\n", "&crarr;<br>")
            boxes.append(
                f'<span style="background:{colours[n % 5]};color:#111;padding:1px 2px">'
                f'{text}<sub style="color:#555">{id}</sub></span>'
            )
        return f'<div style="line-height:2">{" ".join(boxes)}</div>'


path = download.find_path(catalogue.load().models[MODEL], settings.data_folder())
tokenizer = bpe.load(path)
encoding = tokenizer.encoding
display(Tokens(encoding, encoding.encode("The hamburger costs 12 euros, indubitably. 🍔")))

# %% [markdown]
# The four bytes of the picture are spread over several tokens, none of which is a character by
# itself. A server that streams has to hold them back until they are whole (`bpe/stream.py`).
#
# And a conversation? The model reads that as one text too. Its *chat template* writes special
# tokens around each message; those in angle brackets are one token each, and no user can type them.
# This model's template also begins with a system message that we did not write.

# %%
prompt = tokenizer.chat_template.encode(encoding, QUESTION)
display(Tokens(encoding, prompt))

# %% [markdown]
# ## 5. What it could have said: chances
#
# After reading, the model gives every one of its tokens a chance to come next. The API tells us the
# best twenty as *log-probabilities*. Here the text goes to `/v1/completions`, which adds no
# template.

# %%
START = "The capital of France is"


def bars(axis, labels: list[str], chances: list[float], title: str) -> None:
    """Horizontal bars, the likeliest on top."""
    shown = [repr(label)[1:-1].replace(" ", "·") for label in labels]
    axis.barh(range(len(labels)), chances, color="#3b6ea5")
    axis.set_yticks(range(len(labels)), shown, family="monospace")
    axis.set_xlim(0, 1.18)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.invert_yaxis()
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    for row, chance in enumerate(chances):
        text = f"{chance:.1%}" if chance >= 0.001 else "< 0.1%"
        axis.text(chance + 0.01, row, text, va="center", fontsize=9)


reply = client.completions.create(
    model=MODEL, prompt=START, max_tokens=1, temperature=0, logprobs=10
)
(top,) = reply.choices[0].logprobs.top_logprobs
figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
bars(axis, list(top), list(np.exp(list(top.values()))), f"What comes after “{START}”?")
axis.set_xlabel("probability")
plt.show()

# %% [markdown]
# The dot is the space in front, which belongs to the token. Chances say what is
# likely *in text like that which the model has read*; they are no measure of truth.

# %% [markdown]
# ## 6. One level below: without the server
#
# Everything above went through HTTP. Here are the parts that the server is made of: weights from
# the file, `decoder.forward` from token ids to one number for every token of the vocabulary (the
# *logits*), and softmax from logits to chances.

# %%
params, config, _ = checkpoint.load(path, dtype="float32")
ids = encoding.encode(START)
logits, _ = jax.jit(decoder.forward, static_argnums=1)(params, config, np.array([ids], np.int32))
print(f"{config.num_params / 1e6:.1f} million weights; logits are", logits.shape, "[B, T, V]")
last = logits[0, -1]
chances = np.asarray(jax.nn.softmax(last))
difference = max(
    abs(chances[encoding.encode_single_token(token)] - np.exp(logprob))
    for token, logprob in top.items()
)
print(f"the server's chances and ours differ by less than 1e-4: {difference < 1e-4}")

# %% [markdown]
# The temperature divides the logits before the softmax. Below 1 the likely get likelier, above 1
# the field evens out. The last bar is what all other tokens have together: at temperature 2 it is
# nearly everything, and that is why hot answers fall apart.

# %%
best = np.argsort(-chances)[:8]
labels = [encoding.decode([int(i)]) for i in best]
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, temperature in zip(axes, (0.5, 1.0, 2.0), strict=True):
    spread = np.asarray(jax.nn.softmax(last / temperature))
    others = 1 - spread[best].sum()
    bars(axis, [*labels, "(others)"], [*spread[best], others], f"temperature {temperature}")
plt.show()

# %% [markdown]
# `generate` reads the prompt, remembers keys and values in a cache, and draws token after token.
# With the ids of our conversation it must say what the server said; with the server's settings and
# seed it must even throw the same die.

# %%
greedy = encoding.decode(
    list(generate(params, config, prompt, max_new_tokens=64, stop_ids=tokenizer.stop_ids))
)
print(greedy)

sea = tokenizer.chat_template.encode(encoding, STORY)
sampling = SamplingParams(temperature=0.7, seed=1)
drawn = encoding.decode(
    list(
        generate(
            params,
            config,
            sea,
            max_new_tokens=16,
            sampling_params=sampling,
            stop_ids=tokenizer.stop_ids,
        )
    )
)
print(" ".join(drawn.split()))

# %% [markdown]
# ## 7. What we have seen, as assertions

# %%
assert MODEL in ready["models"]
assert "Paris" in answer.choices[0].message.content
assert aliased.model == MODEL
assert "".join(pieces) == answer.choices[0].message.content, "streamed and not: the same text"
assert say(0.7, 1) == say(0.7, 1), "the same seed gives the same answer"
assert answer.usage.prompt_tokens == len(prompt), "the server counts the tokens we see"
assert encoding.decode(prompt) == tokenizer.chat_template.render(QUESTION)
assert abs(chances.sum() - 1) < 1e-4
assert difference < 1e-4, "the server computes what we compute"
assert greedy == answer.choices[0].message.content, "greedy: the same text without a server"
assert " ".join(drawn.split()) == say(0.7, 1), "and with the same seed, the same die"
print("all true")

# %%
server.terminate()
server.wait()
client.close()

# %% [markdown]
# ## Exercises
#
# Fill in a function, run its cell, and the check says whether it is right.
#
# **1.** From the log-probabilities of all candidates, and a temperature, compute the probabilities.
# Do it so that very small ones (log-probability -1000) do no harm.


# %% tags=["stub"]
def tempered(logprobs: list[float], temperature: float) -> list[float]:
    """Probabilities of the candidates at a temperature; they sum to 1."""
    ...


checks.report(checks.tempered, tempered)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def tempered(logprobs: list[float], temperature: float) -> list[float]:
#     top = max(logprobs)  # subtracted, so that the largest exponent is 0
#     weights = [float(np.exp((x - top) / temperature)) for x in logprobs]
#     return [weight / sum(weights) for weight in weights]
# ```
# </details>
#
# **2.** The *perplexity* of a text says between how many equally likely tokens the model hesitated,
# on average: the inverse of the geometric mean of the probabilities of its tokens.


# %% tags=["stub"]
def perplexity(logprobs: list[float]) -> float:
    """Perplexity of a text whose tokens had these log-probabilities."""
    ...


checks.report(checks.perplexity, perplexity)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def perplexity(logprobs: list[float]) -> float:
#     return float(np.exp(-sum(logprobs) / len(logprobs)))
# ```
# </details>
#
# **3.** Tokens arrive one by one, as bytes. After each, return the text that may be shown: never
# half a character. (What `bpe.StreamDecoder` does; do it without.)


# %% tags=["stub"]
def whole_characters(pieces: list[bytes]) -> list[str]:
    """What to show after each piece; joined, the text of all pieces."""
    ...


checks.report(checks.whole_characters, whole_characters)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def whole_characters(pieces: list[bytes]) -> list[str]:
#     shown, held = [], b""
#     for piece in pieces:
#         held += piece
#         whole = held.decode("utf-8", "ignore")  # drops an unfinished end
#         held = held[len(whole.encode()) :]
#         shown.append(whole)
#     return shown
# ```
# </details>
#
# Read next: `bpe/pretokenize.py` and `bpe/merge.py` for the tokens, `transformer/decoder.py` for
# the logits, `transformer/sampling.py` for the die.
