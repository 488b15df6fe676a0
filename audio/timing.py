"""When each word was said: the decoder's attention to the sound, read as a clock.

Some heads of the decoder look at the very place in the sound whose word they are about to write.
Their scores make a picture, tokens by time, with a bright band that only ever moves right. Dynamic
time warping finds the best path along it: a chain of cells, each one step down, right or both from
the last, with the largest sum. Where the path steps down to a new token, that token begins.

After Radford et al.'s reference implementation (timing.py), with its two corrections: a word behind
a pause, or at the end of a sentence, is not let grow into the silence beside it.
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
_PREPEND_PUNCTUATIONS = "\"'“¿([{-"  # punctuation that belongs to the word behind it
_APPEND_PUNCTUATIONS = "\"'.。,，!！?？:：”)]}、"  # and to the word before it
_MEDIAN_FILTER_WIDTH = 7  # steps of 20 ms that the median filter looks at
_LENGTH_BUCKETS = (
    16,
    32,
    64,
    128,
    256,
)  # texts are padded to one of these: few programs to compile


@dataclass(frozen=True)
class Word:
    """A word and when it was said."""

    text: str  # with the space before it, if there is one
    start: float  # seconds
    end: float
    probability: float  # mean over its tokens
    ids: tuple[int, ...]


def align(
    whisper: Whisper,
    sound: jax.Array,
    ids: Sequence[int],
    *,
    num_frames: int,
    language: str = "en",
    task: str = "transcribe",
    with_probabilities: bool = True,
    run: RunOnDevice = run_inline,
) -> list[Word]:
    """Finds the words of a text within a window.

    Args:
        sound: float32 [1, max_audio_len, D], the encoded window.
        ids: the text of the window, without points in time.
        num_frames: columns of spectrogram that hold sound; behind them is padding.
        scored: find the words' probabilities, half of the work; else they are not numbers (nan).

    Returns:
        The words in order, punctuation apart; times count from the start of the window.
    """
    if not ids:
        return []
    scores, probabilities = alignment_scores(
        whisper,
        sound,
        ids,
        num_frames=num_frames,
        language=language,
        task=task,
        with_probabilities=with_probabilities,
        run=run,
    )
    rows, columns = dtw(-alignment_matrix(scores, len(ids)))
    steps = np.flatnonzero(np.diff(rows, prepend=-1))  # where the path comes to a new token
    times = columns[steps] * TIME_PRECISION
    words = whisper.tokenizer.split_words([*ids, whisper.tokenizer.eot], language)[:-1]
    ends = list(itertools.accumulate(len(part) for _, part in words))
    return [
        Word(text, float(times[a]), float(times[b]), float(probabilities[a:b].mean()), tuple(part))
        for (text, part), a, b in zip(words, [0, *ends], ends, strict=False)
    ]


def alignment_scores(
    whisper: Whisper,
    sound: jax.Array,
    ids: Sequence[int],
    *,
    num_frames: int,
    language: str = "en",
    task: str = "transcribe",
    with_probabilities: bool = True,
    run: RunOnDevice = run_inline,
) -> tuple[np.ndarray, np.ndarray]:
    """Where the aligned heads look while they write a text.

    Returns:
        Scores before the softmax, float32 [heads, opening + T + 1, S], a row for each token read,
        the opening's and the end among them, S steps of 20 ms; and the probability of each of the
        T tokens among all words, float32 [T], nan if not `scored`.
    """
    tokens, cfg = whisper.tokenizer, whisper.cfg
    opening = tokens.sot_sequence(language, task, timestamps=False)
    whole = [*opening, *ids, tokens.eot]
    if len(whole) > cfg.max_text_len:
        raise ValueError(f"ids has {len(ids)} tokens, which is more than a window can hold")
    size = next(
        (n for n in _LENGTH_BUCKETS if len(whole) <= n <= cfg.max_text_len), cfg.max_text_len
    )
    padded = np.full((1, size), tokens.eot, np.int32)
    padded[0, : len(whole)] = whole
    scores, probabilities = run(
        lambda: jax.block_until_ready(
            _forward_with_alignment(
                whisper.params, cfg, sound, padded, np.int32(tokens.eot), with_probabilities
            )
        )
    )
    scores = np.asarray(scores)[:, : len(whole), : max(num_frames // 2, 1)]
    # The token at place i is chosen while the one at i - 1 is read.
    return scores, np.asarray(probabilities)[len(opening) - 1 :][: len(ids)]


@functools.partial(jax.jit, static_argnames=("cfg", "with_probabilities"))
def _forward_with_alignment(
    params: Params,
    cfg: Config,
    sound: jax.Array,
    ids: jax.Array,
    eot: jax.Array,
    with_probabilities: bool,
) -> tuple[jax.Array, jax.Array]:
    """Scores [heads, T, S], and the probability that the token at each place precedes the next."""
    logits, found = model.forward(params, cfg, sound, ids, taps=("alignment",))
    if not with_probabilities:
        return found["alignment"][0], jnp.full(ids.shape[1], jnp.nan)
    is_word = jnp.arange(cfg.vocab_size) < eot
    shares = jax.nn.softmax(jnp.where(is_word, logits[0], -jnp.inf), axis=-1)  # [T, V]
    following = jnp.roll(ids[0], -1)
    return found["alignment"][0], jnp.take_along_axis(shares, following[:, None], axis=1)[:, 0]


def alignment_matrix(scores: np.ndarray, num_tokens: int) -> np.ndarray:
    """One picture of all heads: how unusual, for its time, is where each token looks.

    Args:
        scores: as `attention` returns them.
        num_tokens: of the text, T.

    Returns:
        float [T + 1, S], a row for the token that is chosen there; the last is that of the end.
    """
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    deviation = np.maximum(weights.std(axis=1, keepdims=True), 1e-12)
    weights = (weights - weights.mean(axis=1, keepdims=True)) / deviation
    return median_filter(weights).mean(axis=0)[-num_tokens - 2 : -1]


def median_filter(x: np.ndarray) -> np.ndarray:
    """The median of each number and its neighbours along the last axis, mirrored at the ends."""
    half = _MEDIAN_FILTER_WIDTH // 2
    if x.shape[-1] <= half:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN_FILTER_WIDTH, axis=-1)
    return np.partition(windows, half, axis=-1)[..., half]


def dtw(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path from the first cell to the last: dynamic time warping.

    Each step goes down, right, or both. The costs of all cells on a diagonal (row + column = d)
    depend on the two diagonals before it only, so they are computed at once.

    Args:
        cost: float [T, S].

    Returns:
        The rows and the columns of the path's cells, int [cells] each.
    """
    num_rows, num_columns = cost.shape
    # best[i + 1] is the cost of getting to row i, on this diagonal, the last, and the one before.
    last = np.full(num_rows + 1, np.inf)
    before = np.full(num_rows + 1, np.inf)
    before[0] = 0.0  # the way into the first cell
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
    """Shares the words of a window out to its segments, and makes their times agree.

    Args:
        words: what `align` found, with times within the whole sound.
        spans: start and end of each segment, from its points in time.
        counts: tokens of text in each segment.
        last_end: when the last word before this window ended.

    Returns:
        For each segment its words and its start and end.
    """
    lengths = [word.end - word.start for word in words if word.end > word.start]
    typical = min(0.7, float(np.median(lengths))) if lengths else 0.0
    words = _attach_punctuation(_shorten_at_sentence_ends(words, 2 * typical))
    found, at = [], 0
    for (start, end), count in zip(spans, counts, strict=True):
        own, seen = [], 0
        while at < len(words) and seen < count:
            if words[at].text:
                own.append(words[at])
            seen += len(words[at].ids)
            at += 1
        if own:
            own = _shorten_after_pause(own, typical, last_end)
            first, last = own[0], own[-1]
            # A segment's own start and end win over words that reach half a second beyond them.
            if start < first.end and start - 0.5 > first.start:
                own[0] = replace(first, start=max(0.0, min(first.end - typical, start)))
            else:
                start = first.start
            last = own[-1]
            if end > last.start and end + 0.5 < last.end:
                own[-1] = replace(last, end=max(last.start + typical, end))
            else:
                end = last.end
            last_end = end
        found.append((tuple(own), (start, end)))
    return found


def _shorten_at_sentence_ends(words: Sequence[Word], longest: float) -> list[Word]:
    words = list(words)
    for i in range(1, len(words)):
        if words[i].end - words[i].start > longest:
            if words[i].text in _SENTENCE_ENDS:
                words[i] = replace(words[i], end=words[i].start + longest)
            elif words[i - 1].text in _SENTENCE_ENDS:
                words[i] = replace(words[i], start=words[i].end - longest)
    return words


def _attach_punctuation(words: Sequence[Word]) -> list[Word]:
    """Joins punctuation to the word it belongs to; its time does not count, its tokens do."""
    joined: list[Word] = []
    for word in reversed(words):  # what opens goes to the word behind it
        if joined and word.text.startswith(" ") and word.text.strip() in _PREPEND_PUNCTUATIONS:
            after = joined[-1]
            joined[-1] = replace(after, text=word.text + after.text, ids=word.ids + after.ids)
        else:
            joined.append(word)
    words, joined = joined[::-1], []
    for word in words:  # what closes goes to the word before it
        if joined and not joined[-1].text.endswith(" ") and word.text in _APPEND_PUNCTUATIONS:
            before = joined[-1]
            joined[-1] = replace(before, text=before.text + word.text, ids=before.ids + word.ids)
        else:
            joined.append(word)
    return joined


def _shorten_after_pause(words: list[Word], typical: float, last_end: float) -> list[Word]:
    """The first two words behind a pause are not longer than twice the typical word."""
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
