# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Speech: from samples to a spectrogram to words
#
# A microphone gives sixteen thousand numbers a second. Whisper turns them into text with the same
# transformer that writes answers in a chat: an *encoder* looks at a picture of the sound, and a
# *decoder* writes tokens beside it. We follow one sentence of Jane Austen the whole way, and then
# ask the decoder when it heard each word.
#
# *Needs:* a little linear algebra, and `pellucid pull whisper-tiny.en`.
# *Takes:* half a minute to run, half an hour to read.
# *Explains:* `audio/mel.py`, `audio/model.py`, `audio/decode.py`, `audio/timing.py`,
# `audio/vad.py`.

# %%
from pathlib import Path

import checks
import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib_inline.backend_inline import set_matplotlib_formats

import audio
from audio import decode, mel, model, timing, vad
from audio.load import SAMPLE_RATE
from serve import settings
from serve.models import catalogue, download

jax.config.update("jax_compilation_cache_dir", str(settings.data_folder() / "compiled"))

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 38})  # spectrograms make large PNGs

clips = Path("../tests/golden/audio")
samples = audio.load(clips / "austen-0890.flac")
folder = download.find_path(catalogue.load().models["whisper-tiny.en"], settings.data_folder())
whisper = audio.load_model(folder)
tokens, cfg = whisper.tokenizer, whisper.cfg
print(
    f"{len(samples)} samples, {len(samples) / SAMPLE_RATE} seconds, the loudest {abs(samples).max():.2f}"
)

# %% [markdown]
# ## 1. What a microphone hears
#
# Pressure over time. From afar one sees syllables and pauses; from near, that a vowel repeats
# itself some hundred times a second, and that an *s* is noise.

# %%
seconds = np.arange(len(samples)) / SAMPLE_RATE
figure, axes = plt.subplots(3, 1, figsize=(10, 5), layout="constrained")
for axis, (start, end), title in zip(
    axes,
    [(0, 5.3), (0.86, 0.90), (2.92, 2.96)],
    ["Five seconds", "Forty thousandths: a vowel", "and an s"],
    strict=True,
):
    part = slice(int(start * SAMPLE_RATE), int(end * SAMPLE_RATE))
    axis.plot(seconds[part], samples[part], linewidth=0.6)
    axis.set(title=title, yticks=[])
plt.show()

# %% [markdown]
# ## 2. A picture of the sound
#
# What tells vowels apart is which *frequencies* are loud. So every 10 ms we take 25 ms of sound,
# weigh them with a Hann window (so that cutting them out makes no clicks), and split them into
# frequencies by a Fourier transform.

# %%
window = np.hanning(mel.N_FFT + 1)[:-1]


def powers(centre: int) -> np.ndarray:
    """The power of each of 201 frequencies around one sample."""
    frame = samples[centre - mel.N_FFT // 2 : centre + mel.N_FFT // 2]
    return np.abs(np.fft.rfft(frame * window)) ** 2


at = int(0.88 * SAMPLE_RATE) // mel.HOP_LENGTH * mel.HOP_LENGTH
bands = mel.mel_filters(cfg.num_mels)  # [M, 201]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.plot(
    np.fft.rfftfreq(mel.N_FFT, 1 / SAMPLE_RATE), 10 * np.log10(powers(at) + 1e-10), linewidth=0.8
)
left.set(title="The vowel: peaks are its overtones", xlabel="hertz", ylabel="decibels")
right.plot(np.fft.rfftfreq(mel.N_FFT, 1 / SAMPLE_RATE), bands[::6].T, linewidth=0.8)
right.set(title="Every sixth of the 80 mel bands", xlabel="hertz", yticks=[])
plt.show()

# %% [markdown]
# We hear the difference between 200 and 300 Hz well, and not that between 5,000 and 5,100. So the
# 201 powers are gathered into 80 bands: narrow below, wide above (the *mel* scale). And as we hear
# loudness in steps of *times*, not of *plus*, the logarithm is taken. That is the whole log-mel
# spectrogram; by hand it is four lines:

# %%
spectrogram = mel.log_mel(samples, cfg.num_mels)  # [T, M]
by_hand = np.log10(np.maximum(bands @ powers(at), 1e-10))
ours = (np.maximum(by_hand, spectrogram.max() * 4 - 4 - 8) + 4) / 4
error = np.abs(ours - spectrogram[at // mel.HOP_LENGTH]).max()
print(f"one column by hand is what the library says, to 1e-3: {error < 1e-3}")
plt.figure(figsize=(10, 2.6), layout="constrained")
plt.imshow(spectrogram.T, origin="lower", aspect="auto", cmap="magma", extent=(0, 5.3, 0, 80))
plt.title("What Whisper looks at: 100 columns a second, 80 bands")
plt.xlabel("seconds")
plt.ylabel("band")
plt.show()

# %% [markdown]
# ## 3. The encoder reads
#
# Whisper always looks at 30 seconds: 3,000 columns, silence where there is nothing. Two small
# convolutions make 1,500 positions of 384 numbers of them, 20 ms each, and four layers of attention
# let every position hear the whole window. There is no mask: what is said later may tell what was
# said before.

# %%
frames = np.zeros((1, cfg.num_frames, cfg.num_mels), np.float32)
frames[0, : len(spectrogram)] = spectrogram
sound, found = model.encode(whisper.params, cfg, frames, taps=("attention",))
print("from", frames.shape, "to", sound.shape)
heard = len(spectrogram) // 2  # positions that hold sound
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
for layer, axis in enumerate(axes):
    weights = np.asarray(found["attention"][layer, 0].mean(0))[:heard:2, :heard:2]
    axis.imshow(np.sqrt(weights), cmap="viridis", extent=(0, 5.3, 5.3, 0))
    axis.set(title=f"layer {layer + 1}", xlabel="looked at, seconds")
axes[0].set_ylabel("looking, seconds")
plt.show()

# %% [markdown]
# ## 4. The decoder writes
#
# Beside the encoded sound stands a text to be continued. It begins with a special token; then comes
# a point in time (Whisper writes *when* as tokens, too: 1,501 of them, 20 ms apart), then words. We
# let the decoder write the first tokens and look at what else it thought of. What sounds alike
# stands side by side.

# %%
written = [tokens.sot, tokens.timestamp_begin]
for _ in range(18):
    logits, _ = model.forward(whisper.params, cfg, sound, np.array([written], np.int32))
    chances = np.array(jax.nn.softmax(logits[0, -1, : tokens.eot]))
    best = np.argsort(-chances)[:3]
    print(
        f"{tokens.decode(written)[-34:]:>34} |",
        *(f"{tokens.decode([int(i)])!r} {chances[i]:.0%}  " for i in best),
    )
    written.append(int(best[0]))

# %% [markdown]
# Between these numbers and the choice stand rules (`audio/decode.py`): points in time come in pairs
# and never run backwards; signs that nobody pronounces are forbidden; a text that repeats itself,
# or that the model thinks unlikely, is tried again with some chance (*temperature*). With them:

# %%
(result,) = decode.decode(whisper, sound, audio.DecodingOptions())
print(result.text)
points = [(id - tokens.timestamp_begin) * 0.02 for id in result.ids if id >= tokens.timestamp_begin]
print(f"said from {points[0]:.2f} to {points[-1]:.2f} s; a mean log-probability of "
      f"{result.avg_logprob:.2f}; nobody speaks: {result.no_speech_prob:.0%}")  # fmt: skip

# %% [markdown]
# ## 5. When each word was said
#
# To write a word, the decoder must look at its sound. Six of its heads look so exactly that they
# can be read as a clock: their attention makes a picture, tokens by time, with a bright band that
# only moves right. *Dynamic time warping* finds the best path along it: from the first cell to the
# last, each step down, right or both. Where the path comes to a new token, that token begins.

# %%
ids = [id for id in result.ids if id < tokens.eot]
scores, _ = timing.alignment_scores(whisper, sound, ids, num_frames=len(spectrogram))
picture = timing.alignment_matrix(scores, len(ids))
rows, columns = timing.dtw(-picture)
plt.figure(figsize=(10, 4.2), layout="constrained")
plt.imshow(picture, aspect="auto", vmin=0, extent=(0, 5.3, len(picture) - 0.5, -0.5))
plt.plot((columns + 0.5) * 0.02, rows, color="white", linewidth=1)
plt.yticks(range(len(ids)), [tokens.decode([id]) for id in ids], fontsize=7)
plt.xlabel("seconds")
plt.title("Where the decoder looked for each token, and the path")
plt.show()

# %%
words = timing.align(whisper, sound, ids, num_frames=len(spectrogram))
words = [word for word in words if word.text.strip().isalpha()]
plt.figure(figsize=(10, 2.8), layout="constrained")
plt.imshow(spectrogram.T, origin="lower", aspect="auto", cmap="magma", extent=(0, 5.3, 0, 80))
for word in words:
    plt.axvline(word.start, color="white", linewidth=0.6)
    plt.text(word.start, -4, word.text.strip(), rotation=35, fontsize=8, ha="right", va="top")
plt.xticks([])
plt.yticks([])
plt.show()

# %% [markdown]
# ## 6. Nobody speaks
#
# A model that learned to write will write, even over silence. So before it listens, a *detector*
# looks for speech. Ours compares the loudness with the quietest around it: speech stands out, and
# it moves, several syllables a second; noise stays level. Here is our sentence, then a burst of
# noise, in a room that is not quite silent.

# %%
rng = np.random.default_rng(0)
room = rng.normal(0, 2e-4, 14 * SAMPLE_RATE).astype(np.float32)
room[2 * SAMPLE_RATE : 2 * SAMPLE_RATE + len(samples)] += samples
room[9 * SAMPLE_RATE : 12 * SAMPLE_RATE] += rng.normal(0, 0.05, 3 * SAMPLE_RATE).astype(np.float32)
spans = vad.speech_spans(room)
loud = vad.loudness(room)
plt.figure(figsize=(10, 2.4), layout="constrained")
plt.plot(np.arange(len(loud)) / 100, loud, linewidth=0.7)
for start, end in spans:
    plt.axvspan(start, end, alpha=0.2)
plt.ylabel("decibels")
plt.xlabel("seconds; shaded: speech")
plt.show()
transcript = audio.transcribe(
    whisper, room, transcription_options=audio.TranscriptionOptions(word_timestamps=True)
)
for segment in transcript.segments:
    print(f"{segment.start:.1f} to {segment.end:.1f}: {segment.text}")

# %% [markdown]
# ## 7. What we have seen, as assertions

# %%
REFERENCE_TEXT = "Unless to be rather cold-hearted and rather selfish is to be ill-disposed."
assert error < 1e-3, "a column of the spectrogram is four lines of NumPy"
assert sound.shape == (1, 1500, 384)
assert result.text == REFERENCE_TEXT
assert all(a.start <= b.start for a, b in zip(words, words[1:], strict=False))
assert len(spans) == 1 and abs(spans[0][0] - 2) < 0.3, "speech is found, noise is not"
assert "rather selfish" in transcript.text and abs(transcript.segments[0].start - 2) < 0.4
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** The mel scale in Slaney's form: below 1,000 Hz, 15 mels are 1,000 Hz; above, every 27 mels
# are a factor of 6.4.


# %% tags=["stub"]
def mels(hertz: float) -> float:
    """A frequency on the mel scale."""
    ...


checks.report(checks.mels, mels)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mels(hertz: float) -> float:
#     if hertz < 1000:
#         return hertz * 15 / 1000
#     return 15 + 27 * float(np.log(hertz / 1000) / np.log(6.4))
# ```
# </details>
#
# **2.** Dynamic time warping: the least sum of cells on a path from the first cell to the last that
# steps down, right, or both.


# %% tags=["stub"]
def cheapest_path(cost: list[list[float]]) -> float:
    """The cost of the cheapest path through a rectangle of costs."""
    ...


checks.report(checks.cheapest_path, cheapest_path)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cheapest_path(cost: list[list[float]]) -> float:
#     best = {(-1, -1): 0.0}
#     for i, row in enumerate(cost):
#         for j, own in enumerate(row):
#             before = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
#             best[i, j] = own + min(best.get(cell, float("inf")) for cell in before)
#     return best[len(cost) - 1, len(cost[0]) - 1]
# ```
# </details>
#
# **3.** How good is a transcript? The *word error rate*: the fewest words that must be changed, put
# in or left out to make what was said of what was written, divided by the number of words said.


# %% tags=["stub"]
def word_error_rate(written: str, said: str) -> float:
    """Words are what stands between spaces; `said` has at least one."""
    ...


checks.report(checks.word_error_rate, word_error_rate)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def word_error_rate(written: str, said: str) -> float:
#     a, b = written.split(), said.split()
#     best = list(range(len(b) + 1))
#     for i, word in enumerate(a, 1):
#         last, best = best, [i]
#         for j, other in enumerate(b, 1):
#             best.append(min(last[j] + 1, best[-1] + 1, last[j - 1] + (word != other)))
#     return best[-1] / len(b)
# ```
# </details>
#
# Read next: `audio/transcribe.py` for sounds of any length, then
# `serve/api/routes/audio.py` for the same over HTTP.
