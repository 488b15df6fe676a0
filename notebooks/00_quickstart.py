# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: from text to tokens to probabilities, and back to text
#
# We start a server, send requests with OpenAI's client, stream an answer, change the temperature,
# and look at the tokens that the model reads and the probabilities that it computes. At the end we
# compute the same numbers without the server, with `transformer`.
#
# *Needs:* a little Python, and the default model (`pellucid pull`; nothing else is downloaded).
# *Takes:* half a minute to run, 15 minutes to read.
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

# Share the server's cache of compiled programs, so that a second run does not compile them again.
jax.config.update("jax_compilation_cache_dir", str(settings.data_folder() / "compiled"))

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

# %% [markdown]
# ## 1. Start the server and send a request
#
# `make serve` runs `pellucid serve`. Here we start it as a separate process on a free port; with
# `--json` it prints its address when it is ready. `--dtype float32` skips the choice of the fastest
# dtype, and makes the results comparable with our own computation below.

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
print(answer.usage.prompt_tokens, "prompt tokens,", answer.usage.completion_tokens, "generated")

# %% [markdown]
# Programs written for OpenAI's API request one of OpenAI's models. Such a name is an alias of a
# local model, and the response has the name of the local model:

# %%
aliased = client.chat.completions.create(model="gpt-4o-mini", messages=QUESTION, temperature=0)
print(aliased.model, "says:", aliased.choices[0].message.content)

# %% [markdown]
# ## 2. Stream
#
# A model generates one token at a time, so there is no need to wait for the last one. The bars
# separate the text of each event. A token is often a word with the space before it.

# %%
stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
deltas = [event.choices[0].delta.content or "" for event in stream]
print("|".join(delta for delta in deltas if delta))

# %% [markdown]
# ## 3. Temperature and seed
#
# At temperature 0, the most likely token is always chosen. At higher temperatures, a token is drawn
# at random: the higher the temperature, the more uniform the probabilities. The seed determines the
# random numbers.

# %%
STORY = [{"role": "user", "content": "Write a sentence about the sea."}]


def complete(temperature: float, seed: int) -> str:
    """Return an answer of at most 16 tokens, on one line."""
    reply = client.chat.completions.create(
        model=MODEL, messages=STORY, temperature=temperature, top_p=1, seed=seed, max_tokens=16
    )
    return " ".join(reply.choices[0].message.content.split())


for temperature in (0, 0.7, 1.5):
    for seed in (1, 2):
        print(f"temperature {temperature:<4} seed {seed}: {complete(temperature, seed)}")
print(f"temperature 0.7  seed 1: {complete(0.7, 1)} (once more)")

# %% [markdown]
# Try other values, such as another temperature, `top_p=0.5` or another question. Predict the result
# first.

# %% [markdown]
# ## 4. Tokens, the input of the model
#
# First, text is split into *tokens*: strings that are frequent in the text from which the
# vocabulary was trained. Each token has a number, its id. A frequent word is one token, a rare word
# several, and a space belongs to the word after it.


# %%
class Tokens:
    """Tokens with their ids, displayed as colored boxes or as plain text."""

    def __init__(self, encoding: bpe.Encoding, ids: list[int]):
        self.texts = [encoding.decode_single_token_bytes(i).decode("utf-8", "replace") for i in ids]
        self.ids = ids

    def __repr__(self) -> str:
        return "|".join(self.texts) + "\n" + " ".join(map(str, self.ids))

    def _repr_html_(self) -> str:
        colors = ("#cfe3ff", "#ffe3c2", "#d3f2d3", "#f6d5ee", "#fff3b0")
        boxes = []
        for n, (token, id) in enumerate(zip(self.texts, self.ids, strict=True)):
            text = html.escape(token).replace(" ", "&middot;").replace("\n", "&crarr;<br>")
            boxes.append(
                f'<span style="background:{colors[n % 5]};color:#111;padding:1px 2px">'
                f'{text}<sub style="color:#555">{id}</sub></span>'
            )
        return f'<div style="line-height:2">{" ".join(boxes)}</div>'


path = download.find_path(catalogue.load().models[MODEL], settings.data_folder())
tokenizer = bpe.load(path)
encoding = tokenizer.encoding
display(Tokens(encoding, encoding.encode("The hamburger costs 12 euros, indubitably. 🍔")))

# %% [markdown]
# The four bytes of the emoji are divided among several tokens, none of which is a complete
# character. A server that streams has to buffer them until the character is complete
# (`bpe/stream.py`).
#
# A conversation is also one text for the model. Its *chat template* writes special tokens around
# each message. Each of them, in angle brackets, is a single token, which the text of a message
# cannot contain. The template of this model also adds a system message, which our request lacks.

# %%
prompt = tokenizer.chat_template.encode(encoding, QUESTION)
display(Tokens(encoding, prompt))

# %% [markdown]
# ## 5. The probabilities of the next token
#
# The output of the model is a probability for every token of the vocabulary to be the next one. The
# API returns the *log-probabilities* of up to twenty tokens. Here we use `/v1/completions`, which
# applies no chat template.

# %%
START = "The capital of France is"


def plot_bars(axis, labels: list[str], probs: list[float], title: str) -> None:
    """Plot horizontal bars, the first on top."""
    ticks = [repr(label)[1:-1].replace(" ", "·") for label in labels]
    axis.barh(range(len(labels)), probs, color="#3b6ea5")
    axis.set_yticks(range(len(labels)), ticks, family="monospace")
    axis.set_xlim(0, 1.18)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.invert_yaxis()
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    for row, prob in enumerate(probs):
        text = f"{prob:.1%}" if prob >= 0.001 else "< 0.1%"
        axis.text(prob + 0.01, row, text, va="center", fontsize=9)


reply = client.completions.create(
    model=MODEL, prompt=START, max_tokens=1, temperature=0, logprobs=10
)
(top,) = reply.choices[0].logprobs.top_logprobs
figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
plot_bars(axis, list(top), list(np.exp(list(top.values()))), f"The next token after “{START}”")
axis.set_xlabel("probability")
plt.show()

# %% [markdown]
# The dot is the space before the word, which belongs to the token. The probabilities say what is
# likely *in text like the training data*; they are not a measure of truth.

# %% [markdown]
# ## 6. The same computation without the server
#
# The requests above used HTTP. Now we call the parts of the server directly: load the weights from
# the file, compute one number for every token of the vocabulary with `decoder.forward` (the
# *logits*), and convert logits to probabilities with a softmax.

# %%
params, config, _ = checkpoint.load(path, dtype="float32")
ids = encoding.encode(START)
logits, _ = jax.jit(decoder.forward, static_argnums=1)(params, config, np.array([ids], np.int32))
print(f"{config.num_params / 1e6:.1f} million weights; logits are", logits.shape, "[B, T, V]")
last = logits[0, -1]
probs = np.asarray(jax.nn.softmax(last))
difference = max(
    abs(probs[encoding.encode_single_token(token)] - np.exp(logprob))
    for token, logprob in top.items()
)
print(f"the server's probabilities and ours differ by less than 1e-4: {difference < 1e-4}")

# %% [markdown]
# The logits are divided by the temperature before the softmax. Below 1, likely tokens become more
# likely; above 1, the distribution becomes more uniform. The last bar is the sum of all other
# tokens. At temperature 2 it is close to 1, and therefore the text becomes incoherent.

# %%
best = np.argsort(-probs)[:8]
labels = [encoding.decode([int(i)]) for i in best]
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, temperature in zip(axes, (0.5, 1.0, 2.0), strict=True):
    tempered_probs = np.asarray(jax.nn.softmax(last / temperature))
    rest = 1 - tempered_probs[best].sum()
    plot_bars(
        axis, [*labels, "(others)"], [*tempered_probs[best], rest], f"temperature {temperature}"
    )
plt.show()

# %% [markdown]
# `generate` processes the prompt, stores keys and values in a cache, and samples one token after
# another. For the ids of our conversation, it must return the same text as the server. With the
# same sampling parameters and seed, it must also sample the same tokens.

# %%
greedy = encoding.decode(
    list(generate(params, config, prompt, max_new_tokens=64, stop_ids=tokenizer.stop_ids))
)
print(greedy)

sea = tokenizer.chat_template.encode(encoding, STORY)
sampling = SamplingParams(temperature=0.7, seed=1)
sampled = encoding.decode(
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
print(" ".join(sampled.split()))

# %% [markdown]
# ## 7. Summary, as assertions

# %%
assert MODEL in ready["models"]
assert "Paris" in answer.choices[0].message.content
assert aliased.model == MODEL
assert "".join(deltas) == answer.choices[0].message.content, "streaming gives the same text"
assert complete(0.7, 1) == complete(0.7, 1), "the same seed gives the same answer"
assert answer.usage.prompt_tokens == len(prompt), "the server counts the same tokens"
assert encoding.decode(prompt) == tokenizer.chat_template.render(QUESTION)
assert abs(probs.sum() - 1) < 1e-4
assert difference < 1e-4, "the server computes the same probabilities"
assert greedy == answer.choices[0].message.content, "greedy decoding gives the same text"
assert " ".join(sampled.split()) == complete(0.7, 1), "and sampling with the same seed"
print("all true")

# %%
server.terminate()
server.wait()
client.close()

# %% [markdown]
# ## Exercises
#
# Complete each function and run its cell; the check prints whether the function is right.
#
# **1.** Compute the probabilities of all candidates from their log-probabilities and a temperature.
# Very small probabilities (log-probability -1000) must not cause errors.


# %% tags=["stub"]
def tempered(logprobs: list[float], temperature: float) -> list[float]:
    """Return the probabilities of the candidates at a temperature; they sum to 1."""
    ...


checks.report(checks.tempered, tempered)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def tempered(logprobs: list[float], temperature: float) -> list[float]:
#     top = max(logprobs)  # subtract it, so that the largest exponent is 0
#     weights = [float(np.exp((x - top) / temperature)) for x in logprobs]
#     return [weight / sum(weights) for weight in weights]
# ```
# </details>
#
# **2.** The *perplexity* of a text is the inverse of the geometric mean of the probabilities of its
# tokens. It is the average number of equally likely tokens between which the model had to choose.


# %% tags=["stub"]
def perplexity(logprobs: list[float]) -> float:
    """Return the perplexity of a text whose tokens have these log-probabilities."""
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
# **3.** Tokens arrive one by one, as bytes. After each token, return the text that can be
# displayed, without incomplete characters. (`bpe.StreamDecoder` does this; do not use it.)


# %% tags=["stub"]
def whole_characters(tokens: list[bytes]) -> list[str]:
    """Return the text to display after each token; all texts together are the complete text."""
    ...


checks.report(checks.whole_characters, whole_characters)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def whole_characters(tokens: list[bytes]) -> list[str]:
#     texts, buffer = [], b""
#     for token in tokens:
#         buffer += token
#         text = buffer.decode("utf-8", "ignore")  # drops an incomplete character at the end
#         buffer = buffer[len(text.encode()) :]
#         texts.append(text)
#     return texts
# ```
# </details>
#
# Read next: `bpe/pretokenize.py` and `bpe/merge.py` about tokens, `transformer/decoder.py` about
# logits, `transformer/sampling.py` about sampling.
