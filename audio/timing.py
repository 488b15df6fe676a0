"""Word timestamps from the decoder's cross-attention, by dynamic time warping.

Some cross-attention heads attend to the audio position of the token that is generated next. Their
scores form an alignment matrix (one row per token, one column per 20 ms of audio), in which high
values run from the top left to the bottom right. Dynamic time warping finds the path with the
largest sum; each of its cells is one step down, right or both from the cell before. A token begins
where the path enters its row.

The method is that of openai-whisper (timing.py; Radford et al. 2022), with its two corrections: a
word after a pause or at the end of a sentence is shortened if it would extend into the silence.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from audio import model
from audio.config import Config
from audio.model import Params
from audio.tokenizer import TIME_PRECISION
from audio.whisper import RunOnDevice, Whisper, run_inline

_SENTENCE_ENDS = ".。!！?？"
_PREPEND_PUNCTUATIONS = "\"'“¿([{-"  # punctuation that joins the next word
_APPEND_PUNCTUATIONS = "\"'.。,，!！?？:：”)]}、"  # punctuation that joins the previous word
_MEDIAN_FILTER_WIDTH = 7  # steps of 20 ms
# Token sequences are padded to these lengths, so that XLA compiles few programs.
_LENGTH_BUCKETS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Word:
    """A word with its start, end and probability."""

    text: str  # with its leading space, if any
    start: float  # seconds
    end: float
    probability: float  # mean over its tokens
    ids: tuple[int, ...]


def align(
    whisper: Whisper,
    audio_features: jax.Array,
    ids: Sequence[int],
    *,
    num_frames: int,
    language: str = "en",
    task: str = "transcribe",
    with_probabilities: bool = True,
    run: RunOnDevice = run_inline,
) -> list[Word]:
    """Find the start and end of each word in a window.

    Args:
        whisper: the model.
        audio_features: float32 [1, max_audio_len, D], from `model.encode`.
        ids: text tokens of the window, without timestamps.
        num_frames: frames of the spectrogram, without padding.
        language: code or name of the language.
        task: "transcribe" or "translate".
        with_probabilities: compute the words' probabilities, which is half of the work; if false,
            they are nan.
        run: calls the function that it is given (the forward pass), on the device thread or
            inline, and returns its result.

    Returns:
        The words in order, with punctuation marks as separate words. Times are seconds from the
        start of the window.

    Raises:
        ValueError: `ids` is too long for the decoder, or the model does not support the language
            or task.
    """
    if not ids:
        return []
    scores, probabilities = alignment_scores(
        whisper,
        audio_features,
        ids,
        num_frames=num_frames,
        language=language,
        task=task,
        with_probabilities=with_probabilities,
        run=run,
    )
    rows, columns = dtw(-alignment_matrix(scores, len(ids)))
    starts = np.flatnonzero(np.diff(rows, prepend=-1))  # where the path enters a new row
    times = columns[starts] * TIME_PRECISION
    words = whisper.tokenizer.split_words([*ids, whisper.tokenizer.eot], language)[:-1]
    ends = list(itertools.accumulate(len(word_ids) for _, word_ids in words))
    return [
        Word(
            text,
            float(times[a]),
            float(times[b]),
            float(probabilities[a:b].mean()),
            tuple(word_ids),
        )
        for (text, word_ids), a, b in zip(words, [0, *ends], ends, strict=False)
    ]


def alignment_scores(
    whisper: Whisper,
    audio_features: jax.Array,
    ids: Sequence[int],
    *,
    num_frames: int,
    language: str = "en",
    task: str = "transcribe",
    with_probabilities: bool = True,
    run: RunOnDevice = run_inline,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cross-attention scores of the alignment heads for each token of a text.

    Args:
        whisper: the model.
        audio_features: float32 [1, max_audio_len, D], from `model.encode`.
        ids: T text tokens of the window, without timestamps.
        num_frames: frames of the spectrogram, without padding.
        language: code or name of the language.
        task: "transcribe" or "translate".
        with_probabilities: compute the probabilities, which is half of the work; if false, they
            are nan.
        run: calls the function that it is given (the forward pass), on the device thread or
            inline, and returns its result.

    Returns:
        Scores before the softmax, float32 [heads, P + T + 1, S], for the P tokens of the SOT
        sequence, the T text tokens and the end-of-text token, over S steps of 20 ms; and the
        probability of each of the T tokens among all text tokens, float32 [T].

    Raises:
        ValueError: `ids` is too long for the decoder, or the model does not support the language
            or task.
    """
    tokenizer, cfg = whisper.tokenizer, whisper.cfg
    sot_sequence = tokenizer.sot_sequence(language, task, timestamps=False)
    sequence = [*sot_sequence, *ids, tokenizer.eot]
    if len(sequence) > cfg.max_text_len:
        raise ValueError(
            f"ids must have at most {cfg.max_text_len - len(sot_sequence) - 1} tokens, "
            f"got {len(ids)}"
        )
    size = next(
        (n for n in _LENGTH_BUCKETS if len(sequence) <= n <= cfg.max_text_len), cfg.max_text_len
    )
    padded = np.full((1, size), tokenizer.eot, np.int32)
    padded[0, : len(sequence)] = sequence
    eot = np.int32(tokenizer.eot)
    scores, probabilities = run(
        lambda: jax.block_until_ready(
            _forward_with_alignment(
                whisper.params, cfg, audio_features, padded, eot, with_probabilities
            )
        )
    )
    scores = np.asarray(scores)[:, : len(sequence), : max(num_frames // 2, 1)]
    # The logits at position i - 1 predict the token at position i.
    return scores, np.asarray(probabilities)[len(sot_sequence) - 1 :][: len(ids)]


@functools.partial(jax.jit, static_argnames=("cfg", "with_probabilities"))
def _forward_with_alignment(
    params: Params,
    cfg: Config,
    audio_features: jax.Array,
    ids: jax.Array,
    eot: jax.Array,
    with_probabilities: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return scores [heads, T, S], and the probability of the next token at each position, [T]."""
    logits, tapped = model.forward(params, cfg, audio_features, ids, taps=("alignment",))
    if not with_probabilities:
        return tapped["alignment"][0], jnp.full(ids.shape[1], jnp.nan)
    is_text = jnp.arange(cfg.vocab_size) < eot
    shares = jax.nn.softmax(jnp.where(is_text, logits[0], -jnp.inf), axis=-1)  # [T, V]
    next_ids = jnp.roll(ids[0], -1)
    return tapped["alignment"][0], jnp.take_along_axis(shares, next_ids[:, None], axis=1)[:, 0]


def alignment_matrix(scores: np.ndarray, num_tokens: int) -> np.ndarray:
    """Combine the alignment heads into one matrix of text tokens and encoder frames.

    The softmax of each head's scores is standardized over tokens (mean 0, variance 1), smoothed
    over frames with a median filter, and averaged over heads.

    Args:
        scores: [heads, tokens, S] from `alignment_scores`; S frames of 20 ms.
        num_tokens: T, the number of text tokens.

    Returns:
        float [T + 1, S], one row for each text token and one for the end-of-text token.
    """
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    deviation = np.maximum(weights.std(axis=1, keepdims=True), 1e-12)
    weights = (weights - weights.mean(axis=1, keepdims=True)) / deviation
    return median_filter(weights).mean(axis=0)[-num_tokens - 2 : -1]


def median_filter(x: np.ndarray) -> np.ndarray:
    """Apply a median filter of width 7 along the last axis, mirrored at the ends.

    Args:
        x: float [..., T]; returned unchanged if T is at most 3.
    """
    half = _MEDIAN_FILTER_WIDTH // 2
    if x.shape[-1] <= half:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN_FILTER_WIDTH, axis=-1)
    return np.partition(windows, half, axis=-1)[..., half]


def dtw(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the path of lowest total cost from cell (0, 0) to the last: dynamic time warping.

    Each step goes down, right, or both. The costs of all cells on a diagonal (row + column = d)
    depend on the two diagonals before it only, so they are computed together.

    Args:
        cost: float [T, S].

    Returns:
        The rows and the columns of the path's cells, int [cells] each.
    """
    num_rows, num_columns = cost.shape
    # best[i + 1] is the cost of the path to row i on diagonal d; `last` and `before` hold the costs
    # on diagonals d - 1 and d - 2.
    last = np.full(num_rows + 1, np.inf)
    before = np.full(num_rows + 1, np.inf)
    before[0] = 0.0  # the start of the path
    moves = np.empty((num_rows + num_columns - 1, num_rows), np.int8)
    for d in range(num_rows + num_columns - 1):
        i = np.arange(max(0, d - num_columns + 1), min(d, num_rows - 1) + 1)
        both, down, right = before[i], last[i], last[i + 1]
        move = np.full(len(i), 2, np.int8)
        move[(down < both) & (down < right)] = 1
        move[(both < down) & (both < right)] = 0
        best = np.full(num_rows + 1, np.inf)
        best[i + 1] = cost[i, d - i] + np.choose(move, (both, down, right))
        moves[d, i] = move
        before, last = last, best
    row, column = num_rows - 1, num_columns - 1
    path = [(row, column)]
    while row or column:
        move = moves[row + column, row] if row and column else (1 if row else 2)
        row, column = row - (move != 2), column - (move != 1)
        path.append((row, column))
    rows, columns = zip(*reversed(path), strict=True)
    return np.array(rows), np.array(columns)


def assign_words(
    words: Sequence[Word],
    spans: Sequence[tuple[float, float]],
    counts: Sequence[int],
    *,
    last_end: float,
) -> list[tuple[tuple[Word, ...], tuple[float, float]]]:
    """Assign the words of a window to its segments, and reconcile the times of words and segments.

    Args:
        words: from `align`, with times in seconds from the start of the whole audio.
        spans: start and end of each segment in seconds, from its timestamp tokens.
        counts: number of text tokens in each segment.
        last_end: seconds, the end of the last word before this window.

    Returns:
        For each segment, its words, and its start and end in seconds.
    """
    durations = [word.end - word.start for word in words if word.end > word.start]
    typical = min(0.7, float(np.median(durations))) if durations else 0.0
    words = _attach_punctuation(_shorten_at_sentence_ends(words, 2 * typical))
    assigned, index = [], 0
    for (start, end), count in zip(spans, counts, strict=True):
        segment_words: list[Word] = []
        num_tokens = 0
        while index < len(words) and num_tokens < count:
            if words[index].text:
                segment_words.append(words[index])
            num_tokens += len(words[index].ids)
            index += 1
        if segment_words:
            segment_words = _shorten_after_pause(segment_words, typical, last_end)
            first = segment_words[0]
            # A word that extends more than half a second beyond the segment is cut at the segment's
            # time; otherwise the segment takes the time of the word.
            if start < first.end and start - 0.5 > first.start:
                segment_words[0] = replace(first, start=max(0.0, min(first.end - typical, start)))
            else:
                start = first.start
            last = segment_words[-1]
            if end > last.start and end + 0.5 < last.end:
                segment_words[-1] = replace(last, end=max(last.start + typical, end))
            else:
                end = last.end
            last_end = end
        assigned.append((tuple(segment_words), (start, end)))
    return assigned


def _shorten_at_sentence_ends(words: Sequence[Word], longest: float) -> list[Word]:
    """Return the words with sentence ends shortened that take too long.

    In the result, marks that end a sentence, and the words after them, last at most `longest`
    seconds.
    """
    words = list(words)
    for i in range(1, len(words)):
        if words[i].end - words[i].start > longest:
            if words[i].text in _SENTENCE_ENDS:
                words[i] = replace(words[i], end=words[i].start + longest)
            elif words[i - 1].text in _SENTENCE_ENDS:
                words[i] = replace(words[i], start=words[i].end - longest)
    return words


def _attach_punctuation(words: Sequence[Word]) -> list[Word]:
    """Return the words, each joined with its punctuation marks; its times and probability stay."""
    joined: list[Word] = []
    for word in reversed(words):  # opening punctuation joins the next word
        if joined and word.text.startswith(" ") and word.text.strip() in _PREPEND_PUNCTUATIONS:
            next_word = joined[-1]
            joined[-1] = replace(
                next_word, text=word.text + next_word.text, ids=word.ids + next_word.ids
            )
        else:
            joined.append(word)
    words, joined = joined[::-1], []
    for word in words:  # closing punctuation joins the previous word
        if joined and not joined[-1].text.endswith(" ") and word.text in _APPEND_PUNCTUATIONS:
            previous = joined[-1]
            joined[-1] = replace(
                previous, text=previous.text + word.text, ids=previous.ids + word.ids
            )
        else:
            joined.append(word)
    return joined


def _shorten_after_pause(words: list[Word], typical: float, last_end: float) -> list[Word]:
    """Return the words of a segment; after a pause, the first two are shortened if too long.

    Too long means that the first lasts more than twice `typical`, the typical duration of a word,
    or both together more than four times. `last_end` is the end of the word before the segment.
    """
    longest, first = 2 * typical, words[0]
    if first.end - last_end <= 4 * typical:
        return words
    second = words[1] if len(words) > 1 else None
    if first.end - first.start <= longest and (
        second is None or second.end - first.start <= 2 * longest
    ):
        return words
    words = list(words)
    if second is not None and second.end - second.start > longest:
        boundary = max(second.end / 2, second.end - longest)
        words[0], words[1] = replace(first, end=boundary), replace(second, start=boundary)
    words[0] = replace(words[0], start=max(0.0, words[0].end - longest))
    return words
