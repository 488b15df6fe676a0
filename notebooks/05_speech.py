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
# Digital sound has sixteen thousand samples per second. Whisper converts it to text with a
# transformer: an *encoder* processes a spectrogram of the sound, and a *decoder* generates tokens
# that depend on the encoder's output. We process one sentence of Jane Austen step by step, and then
# compute the time of each word.
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
tokenizer, cfg = whisper.tokenizer, whisper.cfg
duration = len(samples) / SAMPLE_RATE
print(f"{len(samples)} samples, {duration} seconds, peak amplitude {abs(samples).max():.2f}")

# %% [markdown]
# ## 1. The waveform
#
# Sound is pressure over time. At a large scale, syllables and pauses are visible. At a small scale,
# a vowel is a wave with a period of about a hundredth of a second, and an *s* is noise.

# %%
seconds = np.arange(len(samples)) / SAMPLE_RATE
figure, axes = plt.subplots(3, 1, figsize=(10, 5), layout="constrained")
for axis, (start, end), title in zip(
    axes,
    [(0, 5.3), (0.86, 0.90), (2.92, 2.96)],
    ["5.3 seconds", "40 milliseconds of a vowel", "40 milliseconds of an s"],
    strict=True,
):
    part = slice(int(start * SAMPLE_RATE), int(end * SAMPLE_RATE))
    axis.plot(seconds[part], samples[part], linewidth=0.6)
    axis.set(title=title, yticks=[])
plt.show()

# %% [markdown]
# ## 2. The spectrogram
#
# Vowels differ in their loud *frequencies*. So every 10 ms we take a frame of 25 ms of sound,
# multiply it with a Hann window (to avoid artifacts from the ends of the frame), and compute its
# frequencies with a Fourier transform.

# %%
window = np.hanning(mel.N_FFT + 1)[:-1]


def powers(center: int) -> np.ndarray:
    """Return the power of each of 201 frequencies in the frame around one sample."""
    frame = samples[center - mel.N_FFT // 2 : center + mel.N_FFT // 2]
    return np.abs(np.fft.rfft(frame * window)) ** 2


center = int(0.88 * SAMPLE_RATE) // mel.HOP_LENGTH * mel.HOP_LENGTH
bands = mel.mel_filters(cfg.num_mels)  # [M, 201]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.plot(
    np.fft.rfftfreq(mel.N_FFT, 1 / SAMPLE_RATE),
    10 * np.log10(powers(center) + 1e-10),
    linewidth=0.8,
)
left.set(title="The vowel: the peaks are overtones", xlabel="hertz", ylabel="decibels")
right.plot(np.fft.rfftfreq(mel.N_FFT, 1 / SAMPLE_RATE), bands[::6].T, linewidth=0.8)
right.set(title="Every sixth of the 80 mel bands", xlabel="hertz", yticks=[])
plt.show()

# %% [markdown]
# Humans hear the difference between 200 and 300 Hz well, but not between 5,000 and 5,100 Hz. So the
# 201 powers are combined to 80 bands, which are narrow at low and wide at high frequencies (the
# *mel* scale). Perceived loudness is proportional to the logarithm of the power, so the logarithm
# is taken. The result is the log-mel spectrogram. One column takes four lines:

# %%
spectrogram = mel.log_mel(samples, cfg.num_mels)  # [T, M]
log_powers = np.log10(np.maximum(bands @ powers(center), 1e-10))
column = (np.maximum(log_powers, spectrogram.max() * 4 - 4 - 8) + 4) / 4
error = np.abs(column - spectrogram[center // mel.HOP_LENGTH]).max()
print(f"the column agrees with the library to 1e-3: {error < 1e-3}")
plt.figure(figsize=(10, 2.6), layout="constrained")
plt.imshow(spectrogram.T, origin="lower", aspect="auto", cmap="magma", extent=(0, 5.3, 0, 80))
plt.title("The input of Whisper: 100 columns per second, 80 bands")
plt.xlabel("seconds")
plt.ylabel("band")
plt.show()

# %% [markdown]
# ## 3. The encoder
#
# The input of Whisper is always 30 seconds, 3,000 columns, padded with silence. Two small
# convolutions convert it to 1,500 positions of 384 numbers, 20 ms each. In four layers of
# attention, every position reads the complete window. There is no causal mask, because later words
# help to recognize earlier ones.

# %%
frames = np.zeros((1, cfg.num_frames, cfg.num_mels), np.float32)
frames[0, : len(spectrogram)] = spectrogram
encoded, tapped = model.encode(whisper.params, cfg, frames, taps=("attention",))
print("from", frames.shape, "to", encoded.shape)
num_positions = len(spectrogram) // 2  # positions without padding
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
for layer, axis in enumerate(axes):
    weights = np.asarray(tapped["attention"][layer, 0].mean(0))[:num_positions:2, :num_positions:2]
    axis.imshow(np.sqrt(weights), cmap="viridis", extent=(0, 5.3, 5.3, 0))
    axis.set(title=f"layer {layer + 1}", xlabel="key, seconds")
axes[0].set_ylabel("query, seconds")
plt.show()

# %% [markdown]
# ## 4. The decoder
#
# The decoder continues a text that depends on the encoded sound. The text begins with a special
# token and a timestamp (timestamps are also tokens: 1,501 of them, 20 ms apart). We generate the
# first tokens and print the three most likely candidates of each step. Many of the candidates sound
# similar.

# %%
generated = [tokenizer.sot, tokenizer.timestamp_begin]
for _ in range(18):
    logits, _ = model.forward(whisper.params, cfg, encoded, np.array([generated], np.int32))
    probs = np.array(jax.nn.softmax(logits[0, -1, : tokenizer.eot]))
    best = np.argsort(-probs)[:3]
    print(
        f"{tokenizer.decode(generated)[-34:]:>34} |",
        *(f"{tokenizer.decode([int(i)])!r} {probs[i]:.0%}  " for i in best),
    )
    generated.append(int(best[0]))

# %% [markdown]
# Decoding applies rules to these probabilities (`audio/decode.py`): timestamps come in pairs and do
# not decrease; symbols that are not spoken are suppressed; a text that is repetitive or unlikely is
# decoded again at a higher *temperature*. With these rules:

# %%
(result,) = decode.decode(whisper, encoded, audio.DecodingOptions())
print(result.text)
begin = tokenizer.timestamp_begin
timestamps = [(id - begin) * 0.02 for id in result.ids if id >= begin]
print(f"speech from {timestamps[0]:.2f} to {timestamps[-1]:.2f} s; mean log-probability "
      f"{result.avg_logprob:.2f}; no-speech probability {result.no_speech_prob:.0%}")  # fmt: skip

# %% [markdown]
# ## 5. The time of each word
#
# To generate a word, the decoder attends to its sound. Six of its heads do this so precisely that
# they can be used to measure time. Their mean attention is a matrix, tokens by time, with a bright
# band that moves to the right. *Dynamic time warping* finds the best path along the band: from the
# first cell to the last, each step goes down, right or both. A token begins where the path reaches
# its row.

# %%
ids = [id for id in result.ids if id < tokenizer.eot]
scores, _ = timing.alignment_scores(whisper, encoded, ids, num_frames=len(spectrogram))
matrix = timing.alignment_matrix(scores, len(ids))
rows, columns = timing.dtw(-matrix)
plt.figure(figsize=(10, 4.2), layout="constrained")
plt.imshow(matrix, aspect="auto", vmin=0, extent=(0, 5.3, len(matrix) - 0.5, -0.5))
plt.plot((columns + 0.5) * 0.02, rows, color="white", linewidth=1)
plt.yticks(range(len(ids)), [tokenizer.decode([id]) for id in ids], fontsize=7)
plt.xlabel("seconds")
plt.title("Cross-attention of each token, and the path")
plt.show()

# %%
words = timing.align(whisper, encoded, ids, num_frames=len(spectrogram))
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
# ## 6. Voice activity detection
#
# Whisper generates text even for silence. Therefore a *detector* looks for speech first. Ours
# compares the loudness with the quietest sound nearby: speech is louder, and its loudness changes
# several times per second with the syllables; the loudness of noise is constant. The test signal is
# our sentence and then a burst of noise, with quiet background noise.

# %%
rng = np.random.default_rng(0)
signal = rng.normal(0, 2e-4, 14 * SAMPLE_RATE).astype(np.float32)
signal[2 * SAMPLE_RATE : 2 * SAMPLE_RATE + len(samples)] += samples
burst = rng.normal(0, 0.05, 3 * SAMPLE_RATE).astype(np.float32)
signal[9 * SAMPLE_RATE : 12 * SAMPLE_RATE] += burst
spans = vad.speech_spans(signal)
loudness = vad.loudness(signal)
plt.figure(figsize=(10, 2.4), layout="constrained")
plt.plot(np.arange(len(loudness)) / 100, loudness, linewidth=0.7)
for start, end in spans:
    plt.axvspan(start, end, alpha=0.2)
plt.ylabel("decibels")
plt.xlabel("seconds; shaded: speech")
plt.show()
transcript = audio.transcribe(
    whisper, signal, transcription_options=audio.TranscriptionOptions(word_timestamps=True)
)
for segment in transcript.segments:
    print(f"{segment.start:.1f} to {segment.end:.1f}: {segment.text}")

# %% [markdown]
# ## 7. Summary, as assertions

# %%
REFERENCE_TEXT = "Unless to be rather cold-hearted and rather selfish is to be ill-disposed."
assert error < 1e-3, "our column of the spectrogram agrees with the library"
assert encoded.shape == (1, 1500, 384)
assert result.text == REFERENCE_TEXT
assert all(a.start <= b.start for a, b in zip(words, words[1:], strict=False))
assert len(spans) == 1 and abs(spans[0][0] - 2) < 0.3, "speech is detected, noise is not"
assert "rather selfish" in transcript.text and abs(transcript.segments[0].start - 2) < 0.4
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** Implement Slaney's mel scale: below 1,000 Hz it is linear, with 15 mels at 1,000 Hz; above,
# it is logarithmic, with 27 mels for a factor of 6.4.


# %% tags=["stub"]
def mels(hertz: float) -> float:
    """Return a frequency on the mel scale."""
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
# **2.** Dynamic time warping: compute the least sum of cells on a path from the first cell to the
# last, where each step goes down, right, or both.


# %% tags=["stub"]
def cheapest_path(cost: list[list[float]]) -> float:
    """Return the cost of the cheapest path through a matrix of costs."""
    ...


checks.report(checks.cheapest_path, cheapest_path)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def cheapest_path(cost: list[list[float]]) -> float:
#     best = {(-1, -1): 0.0}
#     for i, row in enumerate(cost):
#         for j, cell_cost in enumerate(row):
#             previous = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
#             best[i, j] = cell_cost + min(best.get(cell, float("inf")) for cell in previous)
#     return best[len(cost) - 1, len(cost[0]) - 1]
# ```
# </details>
#
# **3.** The quality of a transcript is measured by the *word error rate*: the minimum number of
# words that must be substituted, inserted or deleted to change the transcript to the reference,
# divided by the number of words of the reference.


# %% tags=["stub"]
def word_error_rate(transcript: str, reference: str) -> float:
    """Return the word error rate; words are separated by spaces, `reference` has at least one."""
    ...


checks.report(checks.word_error_rate, word_error_rate)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def word_error_rate(transcript: str, reference: str) -> float:
#     a, b = transcript.split(), reference.split()
#     best = list(range(len(b) + 1))
#     for i, word in enumerate(a, 1):
#         last, best = best, [i]
#         for j, other in enumerate(b, 1):
#             best.append(min(last[j] + 1, best[-1] + 1, last[j - 1] + (word != other)))
#     return best[-1] / len(b)
# ```
# </details>
#
# Read next: `audio/transcribe.py` about recordings of any length, then
# `serve/api/routes/audio.py` about the HTTP endpoint.
