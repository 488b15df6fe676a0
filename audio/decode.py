"""One window of sound, at most 30 seconds, to token ids: what may be said next, and what is.

The decoder writes token after token. Between its logits and the choice stand rules (Radford et al.
2022, section 4.5, and the reference implementation):

- some tokens are never written (`Tokens.suppressed`), and a window does not begin with a blank;
- points in time come in pairs around each segment, never run backwards, and one must come first;
- where all points in time together are likelier than any single word, it is time for one.

Choosing is greedy, or at random with a temperature (the best of several tries is kept), or a beam
search, in which the likeliest few texts are continued side by side. If the result looks wrong (it
repeats itself, so that it compresses too well, or its tokens were unlikely), `decode_with_fallback`
tries again at a higher temperature.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from audio import model
from audio.config import Config
from audio.model import Cache, Params
from audio.tokenizer import TIME_PRECISION, WhisperTokenizer
from audio.whisper import RunOnDevice, Whisper, run_inline

# Prompts are padded to one of these lengths, and the cache grows through these sizes, so that few
# programs are compiled.
_PROMPT_BUCKETS = (4, 16, 64, 256)
_CACHE_BUCKETS = (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How a window is decoded.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    task: Literal["transcribe", "translate"] = "transcribe"
    language: str = "en"  # a code or a name
    temperature: float = 0.0
    best_of: int | None = None  # tries at a temperature above 0
    beam_size: int | None = None  # texts continued side by side at temperature 0
    patience: float = 1.0  # a search ends with beam_size x patience finished texts (2204.05424)
    length_penalty: float | None = None  # exponent of Wu et al. 2016; None: divide by the length
    prompt: tuple[int, ...] = ()  # what was said before, its last 223 tokens count
    hotwords: str = ""  # words likely to occur, put before the prompt
    prefix: str = ""  # what this window begins with
    timestamps: bool = True
    max_initial_timestamp: float = 1.0  # seconds
    suppress_non_speech: bool = True
    suppress_blank: bool = True
    max_new_tokens: int | None = None  # None: half of the decoder's positions
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be between 0 and 2, got {self.temperature}")
        for name in ("best_of", "beam_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.temperature and self.beam_size is not None:
            raise ValueError("beam_size is for temperature 0, best_of for those above")
        if not self.temperature and self.best_of is not None:
            raise ValueError("best_of is for temperatures above 0, beam_size for 0")
        if self.patience <= 0:
            raise ValueError(f"patience must be above 0, got {self.patience}")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise ValueError(f"length_penalty must be between 0 and 1, got {self.length_penalty}")


@dataclass(frozen=True)
class TemperatureFallback:
    """When a result is tried again, hotter, and when it is taken for silence."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4  # above: it repeats itself
    logprob_threshold: float | None = -1.0  # below: it is guessing
    no_speech_threshold: float | None = 0.6  # above, and guessing: nobody speaks

    def needs_fallback(self, result: DecodingResult) -> bool:
        """Whether to try again."""
        return self._is_doubtful(result) and not self.is_silence(result)

    def is_silence(self, result: DecodingResult) -> bool:
        """Whether what was written is not to be believed, because nobody speaks.

        The reference lets a text pass that repeats itself with confidence; over music it does.
        """
        if self.no_speech_threshold is None or result.no_speech_prob <= self.no_speech_threshold:
            return False
        return self.logprob_threshold is None or self._is_doubtful(result)

    def best(self, results: Sequence[DecodingResult]) -> DecodingResult:
        """The result to keep of all attempts at a window: the last, unless it fails too.

        Then it is the likeliest, if possible of those that do not repeat themselves.
        """
        if not self.needs_fallback(results[-1]):
            return results[-1]
        return max(
            [r for r in results if not self._is_repetitive(r)] or results,
            key=lambda r: r.avg_logprob,
        )

    def _is_doubtful(self, result: DecodingResult) -> bool:
        is_guess = (
            self.logprob_threshold is not None and result.avg_logprob < self.logprob_threshold
        )
        return is_guess or self._is_repetitive(result)

    def _is_repetitive(self, result: DecodingResult) -> bool:
        limit = self.compression_ratio_threshold
        return limit is not None and result.compression_ratio > limit


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """What was heard in a window."""

    ids: tuple[int, ...]  # text and points in time
    logprobs: tuple[float, ...]  # of each id, under the rules
    text: str
    avg_logprob: float  # over the ids and the end
    no_speech_prob: float
    temperature: float
    compression_ratio: float


@dataclass
class _Hypothesis:
    """A text being written."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sum_logprobs: float = 0.0  # sum of all log-probabilities, the end's included
    is_done: bool = False

    def extended(self, id: int, logprob: float, eot: int) -> _Hypothesis:
        """This text with one token more."""
        if id == eot:
            return _Hypothesis(self.ids, self.logprobs, self.sum_logprobs + logprob, True)
        return _Hypothesis([*self.ids, id], [*self.logprobs, logprob], self.sum_logprobs + logprob)


def decode(
    whisper: Whisper, sound: jax.Array, options: DecodingOptions, *, run: RunOnDevice = run_inline
) -> list[DecodingResult]:
    """Writes down what is said in some windows.

    Args:
        sound: float32 [A, max_audio_len, D], what `model.encode` made of each window.
        options: the same for all windows.
        run: does the pieces of device work, a step of all rows each.

    Returns:
        A result for each window.

    Raises:
        ValueError: the model does not know the language or task, or the prefix fills the window.
    """
    tokens, cfg = whisper.tokenizer, whisper.cfg
    opening = _prompt_tokens(tokens, cfg, options)
    num_rows = (options.best_of if options.temperature else options.beam_size) or 1
    writer = _DecodingTask(whisper, sound, opening, options, num_rows, run)
    search = _beam_search if options.beam_size else _sample
    candidates = search(writer, options, len(sound), num_rows)
    return [
        _result(tokens, _best_hypothesis(rows, options), float(writer.no_speech_probs[i]), options)
        for i, rows in enumerate(candidates)
    ]


def decode_with_fallback(
    whisper: Whisper,
    sound: jax.Array,
    options: DecodingOptions,
    fallback: TemperatureFallback,
    *,
    best_of: int | None = 5,
    run: RunOnDevice = run_inline,
) -> list[DecodingResult]:
    """`decode`, again at higher temperatures for the windows whose result looks wrong.

    If every attempt looks wrong, the best is kept (`Fallback.best`), as in faster-whisper;
    openai-whisper keeps the last, the one with the most chance in it.

    Args:
        options: its temperature is replaced by the fallback's; its beams count at temperature 0.
        best_of: tries at temperatures above 0.
    """
    attempts: list[list[DecodingResult]] = [[] for _ in range(len(sound))]
    waiting = list(range(len(sound)))
    for temperature in fallback.temperatures:
        own = replace(options, temperature=temperature, best_of=None)
        if temperature:
            own = replace(options, temperature=temperature, beam_size=None, best_of=best_of)
        # All windows at first; then one by one, so that any number of them takes one program.
        for group in [[i] for i in waiting] if attempts[0] else [waiting]:
            part = sound if len(group) == len(sound) else sound[np.array(group)]
            for i, result in zip(group, decode(whisper, part, own, run=run), strict=True):
                attempts[i].append(result)
        waiting = [i for i in waiting if fallback.needs_fallback(attempts[i][-1])]
        if not waiting:
            break
    return [fallback.best(results) for results in attempts]


def teacher_forced_logits(
    whisper: Whisper,
    sound: jax.Array,
    ids: Sequence[int],
    options: DecodingOptions,
    *,
    run: RunOnDevice = run_inline,
) -> np.ndarray:
    """The logits before each of the given ids and behind the last (teacher forcing).

    Args:
        sound: float32 [1, max_audio_len, D].
        ids: what is written, fewer than half of the decoder's positions.

    Returns:
        float32 [len(ids) + 1, V].
    """
    writer = _DecodingTask(
        whisper, sound, _prompt_tokens(whisper.tokenizer, whisper.cfg, options), options, 1, run
    )
    logits = [writer.logits]
    for id in ids:
        writer.decode_step([id])
        logits.append(writer.logits)
    return np.concatenate([np.asarray(part) for part in logits])


def detect_language(
    whisper: Whisper, sound: jax.Array, *, run: RunOnDevice = run_inline
) -> list[dict[str, float]]:
    """The probability of each language, for each window [A, max_audio_len, D]."""
    tokens = whisper.tokenizer
    if not tokens.is_multilingual:
        return [{"en": 1.0}] * len(sound)
    writer = _DecodingTask(whisper, sound, (tokens.sot,), DecodingOptions(), 1, run)
    first = tokens.sot + 1
    logits = writer.logits[:, first : first + len(tokens.languages)]
    shares = np.asarray(jax.nn.softmax(logits, axis=-1))
    return [dict(zip(tokens.languages, row.tolist(), strict=True)) for row in shares]


def _prompt_tokens(
    tokens: WhisperTokenizer, cfg: Config, options: DecodingOptions
) -> tuple[int, ...]:
    """What stands before the first token to be chosen."""
    half = cfg.max_text_len // 2
    before = options.prompt[-(half - 1) :]
    if options.hotwords.strip():
        hot = tokens.encode(" " + options.hotwords.strip())[: half - 1]
        before = (*hot, *before[len(before) - max(half - 1 - len(hot), 0) :])[: half - 1]
    prefix = tokens.encode(" " + options.prefix.strip()) if options.prefix.strip() else ()
    if len(prefix) >= half:
        raise ValueError(f"prefix has {len(prefix)} tokens, at most {half - 1} fit")
    opening = tokens.sot_sequence(options.language, options.task, timestamps=options.timestamps)
    return (*((tokens.sot_prev, *before) if before else ()), *opening, *prefix)


# Ways of choosing


def _sample(
    writer: _DecodingTask, options: DecodingOptions, num_sounds: int, tries: int
) -> list[list[_Hypothesis]]:
    """The likeliest token each time, or one drawn at random; `tries` texts for each sound."""
    eot = writer.tokenizer.eot
    rows = [_Hypothesis() for _ in range(num_sounds * tries)]
    while True:
        ids, logprobs = writer.sample(rows, options)
        rows = [
            row if row.is_done else row.extended(id, logprob, eot)
            for row, id, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True)
        ]
        if all(row.is_done for row in rows) or not writer.has_room:
            return [rows[i : i + tries] for i in range(0, len(rows), tries)]
        writer.decode_step([row.ids[-1] if not row.is_done else eot for row in rows])


def _beam_search(
    writer: _DecodingTask, options: DecodingOptions, num_sounds: int, beams: int
) -> list[list[_Hypothesis]]:
    """Continues the `beams` likeliest texts of each sound until enough have come to an end."""
    eot, enough = writer.tokenizer.eot, max(1, round(beams * options.patience))
    live = [[_Hypothesis() for _ in range(beams)] for _ in range(num_sounds)]
    done: list[list[_Hypothesis]] = [[] for _ in range(num_sounds)]
    is_first = True
    while True:
        # One more than the beams: at most one continuation of a text is its end.
        ids, logprobs = writer.top_k([row for rows in live for row in rows], options, beams + 1)
        sources = []
        for a in range(num_sounds):
            ways = [
                (row.extended(int(id), float(logprob), eot), a * beams + b)
                for b, row in enumerate(live[a][: 1 if is_first else beams])  # all alike at first
                for id, logprob in zip(ids[a * beams + b], logprobs[a * beams + b], strict=True)
            ]
            ways.sort(key=lambda way: -way[0].sum_logprobs)
            going: list[tuple[_Hypothesis, int]] = []
            for row, source in ways:
                if len(going) == beams:
                    break
                if not row.is_done:
                    going.append((row, source))
                elif len(done[a]) < enough:
                    done[a].append(row)
            live[a] = [row for row, _ in going]
            sources += [source for _, source in going]
        is_first = False
        if all(len(rows) >= enough for rows in done) or not writer.has_room:
            break
        writer.decode_step([row.ids[-1] for rows in live for row in rows], sources)
    # Of a sound with too few ends, what was going on counts as ended.
    return [
        (ended + going)[: max(beams, len(ended))] for ended, going in zip(done, live, strict=True)
    ]


def _best_hypothesis(rows: list[_Hypothesis], options: DecodingOptions) -> _Hypothesis:
    """The text with the highest log-probability for its length."""

    def score(row: _Hypothesis) -> float:
        length = max(len(row.ids), 1)
        if options.length_penalty is None:
            return row.sum_logprobs / length
        return row.sum_logprobs / ((5 + length) / 6) ** options.length_penalty

    return max(rows, key=score)


def _result(
    tokens: WhisperTokenizer, row: _Hypothesis, no_speech_prob: float, options: DecodingOptions
) -> DecodingResult:
    text = tokens.decode(row.ids).strip()
    return DecodingResult(
        ids=tuple(row.ids),
        logprobs=tuple(row.logprobs),
        text=text,
        avg_logprob=row.sum_logprobs / (len(row.ids) + 1),
        no_speech_prob=no_speech_prob,
        temperature=options.temperature,
        compression_ratio=compression_ratio(text),
    )


def compression_ratio(text: str) -> float:
    """How many times smaller zlib makes a text; repetitions make it large."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


# The decoder at work


class _DecodingTask:
    """The decoder with some texts in hand: reads the opening, then a token a row and step.

    Attributes:
        logits: float32 [B, V], what may come next.
        no_speech: float32 [A], the probability that nobody speaks.
    """

    def __init__(
        self,
        whisper: Whisper,
        sound: jax.Array,
        opening: tuple[int, ...],
        options: DecodingOptions,
        rows_per_sound: int,
        run: RunOnDevice,
    ):
        self.whisper, self.tokenizer, self._run = whisper, whisper.tokenizer, run
        self._options, self._length, self._step = options, len(opening), 0
        cfg, params = whisper.cfg, whisper.params
        most = options.max_new_tokens or cfg.max_text_len // 2
        self._end = min(self._length + most, cfg.max_text_len)
        self._keys = jax.random.split(jax.random.key(options.seed), len(sound) * rows_per_sound)
        padded = _bucket_size(self._length, _PROMPT_BUCKETS, cfg.max_text_len)
        ids = np.full((len(sound) * rows_per_sound, padded), self.tokenizer.eot, np.int32)
        ids[:, : self._length] = opening
        sot = opening.index(self.tokenizer.sot)
        at = np.array([sot, self._length - 1], np.int32)

        def read() -> tuple[jax.Array, Cache]:
            size = _bucket_size(max(padded, self._length + 1), _CACHE_BUCKETS, cfg.max_text_len)
            cache = model.init_cache(params, cfg, sound, size=size, rows_per_audio=rows_per_sound)
            logits, cache = _forward_cached(params, cfg, ids, cache, np.int32(0), at)
            return jax.block_until_ready(logits), cache

        logits, self._cache = run(read)
        no_speech = jax.nn.softmax(logits[::rows_per_sound, 0], axis=-1)[
            :, self.tokenizer.no_speech
        ]
        self.no_speech_probs = np.asarray(no_speech)
        self.logits = logits[:, 1]

    @property
    def has_room(self) -> bool:
        """Whether another token may be read."""
        return self._length + 1 < self._end

    def decode_step(self, ids: Sequence[int], sources: Sequence[int] | None = None) -> None:
        """Reads one token a row.

        Args:
            ids: the token of each row.
            sources: the row whose past each row goes on from; None: its own.
        """
        cfg, params = self.whisper.cfg, self.whisper.params

        def read() -> tuple[jax.Array, Cache]:
            cache = self._cache
            if self._length == cache.size:
                size = _bucket_size(self._length + 1, _CACHE_BUCKETS, cfg.max_text_len)
                cache = model.grow_cache(cache, size)
            if sources is not None and list(sources) != list(range(len(ids))):
                cache = _reorder_cache(cache, np.array(sources, np.int32))
            logits, cache = _forward_cached(
                params,
                cfg,
                np.array(ids, np.int32)[:, None],
                cache,
                np.int32(self._length),
                np.zeros(1, np.int32),
            )
            return jax.block_until_ready(logits), cache

        logits, self._cache = self._run(read)
        self.logits = logits[:, 0]
        self._length += 1
        self._step += 1

    def sample(
        self, rows: Sequence[_Hypothesis], options: DecodingOptions
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token a row, int32 [B], and its log-probability under the rules, float32 [B]."""
        allowed = self._constraints(rows)
        temperature = options.temperature
        if temperature:
            ids, logprobs = _sample_ids(
                self.logits, *allowed, self._keys, np.int32(self._step), np.float32(temperature)
            )
        else:
            ids, logprobs = _greedy_ids(self.logits, *allowed)
        return np.asarray(ids), np.asarray(logprobs)

    def top_k(
        self, rows: Sequence[_Hypothesis], options: DecodingOptions, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `count` likeliest tokens a row, int32 [B, count], and their log-probabilities."""
        logprobs = np.asarray(_constrained_logprobs(self.logits, *self._constraints(rows)))
        some = np.argpartition(-logprobs, count, axis=-1)[:, :count]
        values = np.take_along_axis(logprobs, some, axis=-1)
        order = np.argsort(-values, axis=-1, kind="stable")
        return np.take_along_axis(some, order, -1), np.take_along_axis(values, order, -1)

    def _constraints(
        self, rows: Sequence[_Hypothesis]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """The arguments of `_constrain` behind the logits."""
        is_first, options = self._step == 0, self._options
        blocked = _suppress_mask(self.tokenizer, options, self.whisper.cfg.vocab_size, is_first)
        begin, last = self.tokenizer.timestamp_begin, self.whisper.cfg.vocab_size
        if not options.timestamps:
            ranges = [(0, begin, last)] * len(rows)
        elif is_first:
            most = begin + round(options.max_initial_timestamp / TIME_PRECISION)
            ranges = [(begin, begin, most + 1)] * len(rows)
        else:
            ranges = [_allowed_ranges(row.ids, self.tokenizer, last) for row in rows]
        return blocked, np.array(ranges, np.int32), np.int32(begin), options.timestamps


def _allowed_ranges(
    ids: Sequence[int], tokens: WhisperTokenizer, last: int
) -> tuple[int, int, int]:
    """What may follow some ids: words from one id on, and points in time from one up to another.

    After a word: any word, and any point in time behind the last one. After the point that ends a
    segment: the end, or the point that begins the next. After that: a word.
    """
    begin = tokens.timestamp_begin
    points = [id for id in ids if id >= begin]
    is_point = ids[-1:] and ids[-1] >= begin
    if is_point and (len(ids) < 2 or ids[-2] >= begin):
        return 0, last, last
    if is_point:
        return tokens.eot, ids[-1], last
    return 0, points[-1] + 1 if points else begin, last


@functools.lru_cache(maxsize=16)
def _mask(ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    mask = np.zeros(vocab_size, bool)
    mask[list(ids)] = True
    return mask


def _suppress_mask(
    tokens: WhisperTokenizer, options: DecodingOptions, vocab_size: int, is_first: bool
) -> np.ndarray:
    """bool [V], which tokens are not to be written whatever stands before them."""
    ids = tokens.suppress_tokens if options.suppress_non_speech else ()
    if options.timestamps:
        ids = (*ids, tokens.no_timestamps)
    if is_first and options.suppress_blank:
        ids = (*ids, *tokens.encode(" "), tokens.eot)
    return _mask(tuple(ids), vocab_size)


@jax.jit
def _constrained_logprobs(
    logits: jax.Array, blocked: jax.Array, ranges: jax.Array, begin: jax.Array, timed: bool
) -> jax.Array:
    """Log-probabilities under the rules, float32 [B, V]; -inf for what may not follow.

    Args:
        logits: float32 [B, V].
        blocked: bool [V].
        ranges: int32 [B, 3]: of the ids below `begin`, those from the first number on may follow;
            of the points in time, those from the second up to the third.
        begin: the first point in time.
        timed: whether points in time are being written.
    """
    ids = jnp.arange(logits.shape[-1])
    first, low, high = (ranges[:, i, None] for i in range(3))
    is_point = ids >= begin
    allowed = jnp.where(is_point, (ids >= low) & (ids < high), ids >= first) & ~blocked
    logits = jnp.where(allowed, logits, -jnp.inf)
    points = jax.nn.logsumexp(jnp.where(is_point, logits, -jnp.inf), axis=-1, keepdims=True)
    word = jnp.max(jnp.where(is_point, -jnp.inf, logits), axis=-1, keepdims=True)
    logits = jnp.where(timed & (points > word) & ~is_point, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


@jax.jit
def _greedy_ids(logits: jax.Array, *rules) -> tuple[jax.Array, jax.Array]:
    """The likeliest token under the rules, and its log-probability."""
    logprobs = _constrained_logprobs(logits, *rules)
    best = logprobs.max(axis=-1)
    # As argmax, which XLA's CPU backend does not vectorise: half the time of all of this.
    ids = jnp.arange(logits.shape[-1])
    return jnp.where(logprobs == best[:, None], ids, len(ids)).min(axis=-1), best


@jax.jit
def _sample_ids(logits: jax.Array, *rest) -> tuple[jax.Array, jax.Array]:
    """A token drawn under the rules, and its log-probability at temperature 1."""
    *rules, keys, step, temperature = rest
    logprobs = _constrained_logprobs(logits, *rules)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    # Where one random number falls on the probabilities, laid end to end. A random number for each
    # token (jax.random.categorical) takes four times as long.
    places = jax.vmap(jax.random.uniform)(keys)
    ends = jnp.cumsum(jax.nn.softmax(logprobs / temperature, axis=-1), axis=-1)
    ids = (ends <= (places * ends[:, -1])[:, None]).sum(axis=-1)
    return ids, jnp.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def _forward_cached(
    params: Params, cfg: Config, ids, cache: Cache, length, at
) -> tuple[jax.Array, Cache]:
    logits, cache, _ = model.forward_cached(params, cfg, ids, cache, length, at)
    return logits, cache


@functools.partial(jax.jit, donate_argnames="cache")
def _reorder_cache(cache: Cache, rows: jax.Array) -> Cache:
    return model.reorder_cache(cache, rows)


def _bucket_size(number: int, steps: Sequence[int], most: int) -> int:
    """The first of `steps` that is not below `number`, or else `most`."""
    return next((step for step in steps if number <= step <= most), most)
