"""Decoding of windows of at most 30 seconds: logits to token ids under Whisper's constraints.

The decoder generates one token at a time. Before sampling, its logits are constrained (Radford et
al. 2022, section 4.5, and the reference implementation):

- some tokens are suppressed (`WhisperTokenizer.suppress_tokens`), and the first token must not be a
  space or the end of the text;
- the first token is a timestamp, timestamps come in pairs around each segment, and they never
  decrease;
- if the total probability of all timestamps exceeds that of every text token, a timestamp is
  sampled.

Sampling is greedy, or random at a temperature (the best of `best_of` samples is returned), or a
beam search. If a result is repetitive (its compression ratio is high) or unlikely (its average
log-probability is low), `decode_with_fallback` decodes again at a higher temperature.
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

# Prompts are padded to these lengths and the KV cache grows through these sizes, so that XLA
# compiles few programs.
_PROMPT_BUCKETS = (4, 16, 64, 256)
_CACHE_BUCKETS = (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Options of decoding a window.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    task: Literal["transcribe", "translate"] = "transcribe"
    language: str = "en"  # a code or an English name
    temperature: float = 0.0
    best_of: int | None = None  # samples at a temperature above 0
    beam_size: int | None = None  # hypotheses of the beam search at temperature 0
    patience: float = 1.0  # stop at beam_size x patience finished hypotheses (2204.05424)
    length_penalty: float | None = None  # exponent of Wu et al. 2016; None: divide by the length
    prompt: tuple[int, ...] = ()  # token ids of the previous text; the last 223 are used
    hotwords: str = ""  # words likely to occur; inserted before the prompt
    prefix: str = ""  # text that this window begins with
    timestamps: bool = True
    max_initial_timestamp: float = 1.0  # seconds
    suppress_non_speech: bool = True
    suppress_blank: bool = True
    max_new_tokens: int | None = None  # None: half of max_text_len
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be between 0 and 2, got {self.temperature}")
        for name in ("best_of", "beam_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.temperature and self.beam_size is not None:
            raise ValueError(f"beam_size needs temperature 0, got {self.temperature}; use best_of")
        if not self.temperature and self.best_of is not None:
            raise ValueError("best_of needs a temperature above 0, got 0; use beam_size")
        if self.patience <= 0:
            raise ValueError(f"patience must be above 0, got {self.patience}")
        if self.length_penalty is not None and not 0 <= self.length_penalty <= 1:
            raise ValueError(f"length_penalty must be between 0 and 1, got {self.length_penalty}")


@dataclass(frozen=True)
class TemperatureFallback:
    """When to decode a window again at a higher temperature, and when to discard it as silence."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4  # above: the text is repetitive
    logprob_threshold: float | None = -1.0  # of avg_logprob; below: the text is unlikely
    no_speech_threshold: float | None = 0.6  # above, and unlikely or repetitive: no speech

    def needs_fallback(self, result: DecodingResult) -> bool:
        """Return whether to decode the window again at a higher temperature."""
        return self._is_doubtful(result) and not self.is_silence(result)

    def is_silence(self, result: DecodingResult) -> bool:
        """Return whether to discard a result because the window has no speech.

        openai-whisper keeps text that is repetitive but likely, which occurs over music; here such
        text is discarded too.
        """
        if self.no_speech_threshold is None or result.no_speech_prob <= self.no_speech_threshold:
            return False
        return self.logprob_threshold is None or self._is_doubtful(result)

    def best(self, results: Sequence[DecodingResult]) -> DecodingResult:
        """Return the best result of all attempts at a window.

        That is the last result, unless it needs a fallback as well. Then it is the result with the
        highest average log-probability, among the results that are not repetitive if any are not.
        """
        if not self.needs_fallback(results[-1]):
            return results[-1]
        return max(
            [r for r in results if not self._is_repetitive(r)] or results,
            key=lambda r: r.avg_logprob,
        )

    def _is_doubtful(self, result: DecodingResult) -> bool:
        is_unlikely = (
            self.logprob_threshold is not None and result.avg_logprob < self.logprob_threshold
        )
        return is_unlikely or self._is_repetitive(result)

    def _is_repetitive(self, result: DecodingResult) -> bool:
        limit = self.compression_ratio_threshold
        return limit is not None and result.compression_ratio > limit


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """Text of a window, with its scores."""

    ids: tuple[int, ...]  # text and timestamp tokens
    logprobs: tuple[float, ...]  # of each id, under the constraints
    text: str
    avg_logprob: float  # over the ids and the end-of-text token
    no_speech_prob: float
    temperature: float
    compression_ratio: float


@dataclass
class _Hypothesis:
    """The tokens decoded so far for one row, with their log-probabilities."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sum_logprobs: float = 0.0  # of `ids`, and of the end-of-text token once `is_done`
    is_done: bool = False

    def extended(self, id: int, logprob: float, eot: int) -> _Hypothesis:
        """Return this hypothesis with one more token; the end-of-text token `eot` finishes it."""
        if id == eot:
            return _Hypothesis(self.ids, self.logprobs, self.sum_logprobs + logprob, True)
        return _Hypothesis([*self.ids, id], [*self.logprobs, logprob], self.sum_logprobs + logprob)


def decode(
    whisper: Whisper,
    audio_features: jax.Array,
    options: DecodingOptions,
    *,
    run: RunOnDevice = run_inline,
) -> list[DecodingResult]:
    """Decode a batch of windows.

    Args:
        whisper: the model.
        audio_features: float32 [A, max_audio_len, D], from `model.encode`, one window per row.
        options: used for all windows.
        run: calls the function that it is given (the prefill, or one decoding step of all rows), on
            the device thread or inline, and returns its result.

    Returns:
        A result for each window.

    Raises:
        ValueError: the model does not support the language or task, or the prefix is too long.
    """
    tokenizer, cfg = whisper.tokenizer, whisper.cfg
    prompt = _prompt_tokens(tokenizer, cfg, options)
    num_rows = (options.best_of if options.temperature else options.beam_size) or 1
    task = _DecodingTask(whisper, audio_features, prompt, options, num_rows, run)
    search = _beam_search if options.beam_size else _sample
    hypotheses = search(task, options, len(audio_features), num_rows)
    return [
        _result(tokenizer, _best_hypothesis(rows, options), float(task.no_speech_probs[i]), options)
        for i, rows in enumerate(hypotheses)
    ]


def decode_with_fallback(
    whisper: Whisper,
    audio_features: jax.Array,
    options: DecodingOptions,
    fallback: TemperatureFallback,
    *,
    best_of: int | None = 5,
    run: RunOnDevice = run_inline,
) -> list[DecodingResult]:
    """Decode a batch of windows; decode those that need a fallback again at higher temperatures.

    If every attempt at a window needs a fallback, the best one is returned
    (`TemperatureFallback.best`), as in faster-whisper; openai-whisper returns the last, which has
    the highest temperature.

    Args:
        whisper: the model.
        audio_features: float32 [A, max_audio_len, D], from `model.encode`, one window per row.
        options: the temperature is replaced by those of `fallback`; `beam_size` is used at
            temperature 0 only.
        fallback: the temperatures, and the thresholds for trying the next one.
        best_of: samples per window at temperatures above 0.
        run: see `decode`.

    Returns:
        A result for each window.

    Raises:
        ValueError: see `decode`.
    """
    attempts: list[list[DecodingResult]] = [[] for _ in range(len(audio_features))]
    pending = list(range(len(audio_features)))
    for temperature in fallback.temperatures:
        attempt_options = replace(options, temperature=temperature, best_of=None)
        if temperature:
            attempt_options = replace(
                options, temperature=temperature, beam_size=None, best_of=best_of
            )
        # The first attempt decodes all windows in one batch. Later attempts decode one window at a
        # time, so that one compiled program serves any number of windows.
        for group in [[i] for i in pending] if attempts[0] else [pending]:
            batch = (
                audio_features
                if len(group) == len(audio_features)
                else audio_features[np.array(group)]
            )
            results = decode(whisper, batch, attempt_options, run=run)
            for i, result in zip(group, results, strict=True):
                attempts[i].append(result)
        pending = [i for i in pending if fallback.needs_fallback(attempts[i][-1])]
        if not pending:
            break
    return [fallback.best(results) for results in attempts]


def teacher_forced_logits(
    whisper: Whisper,
    audio_features: jax.Array,
    ids: Sequence[int],
    options: DecodingOptions,
    *,
    run: RunOnDevice = run_inline,
) -> np.ndarray:
    """Feed given tokens (teacher forcing); return the logits before each token and after the last.

    Args:
        whisper: the model.
        audio_features: float32 [1, max_audio_len, D], from `model.encode`.
        ids: the token ids to feed, fewer than half of `max_text_len`.
        options: language, task, prompt and timestamps.
        run: see `decode`.

    Returns:
        float32 [len(ids) + 1, V].

    Raises:
        ValueError: see `decode`.
    """
    prompt = _prompt_tokens(whisper.tokenizer, whisper.cfg, options)
    task = _DecodingTask(whisper, audio_features, prompt, options, 1, run)
    logits = [task.logits]
    for id in ids:
        task.decode_step([id])
        logits.append(task.logits)
    return np.concatenate([np.asarray(step_logits) for step_logits in logits])


def detect_language(
    whisper: Whisper, audio_features: jax.Array, *, run: RunOnDevice = run_inline
) -> list[dict[str, float]]:
    """Return the probability of each language for each window.

    Args:
        whisper: the model; for an English-only model the result is {"en": 1.0}.
        audio_features: float32 [A, max_audio_len, D], from `model.encode`, one window per row.
        run: calls the function that it is given (the prefill), on the device thread or
            inline, and returns its result.

    Returns:
        For each window the probabilities by language code; they sum to 1.
    """
    tokenizer = whisper.tokenizer
    if not tokenizer.is_multilingual:
        return [{"en": 1.0}] * len(audio_features)
    task = _DecodingTask(whisper, audio_features, (tokenizer.sot,), DecodingOptions(), 1, run)
    first = tokenizer.sot + 1
    logits = task.logits[:, first : first + len(tokenizer.languages)]
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    return [dict(zip(tokenizer.languages, row.tolist(), strict=True)) for row in probabilities]


def _prompt_tokens(
    tokenizer: WhisperTokenizer, cfg: Config, options: DecodingOptions
) -> tuple[int, ...]:
    """Return the tokens before the first generated one: previous text, SOT sequence, prefix."""
    half = cfg.max_text_len // 2
    previous = options.prompt[-(half - 1) :]
    if options.hotwords.strip():
        hotwords = tokenizer.encode(" " + options.hotwords.strip())[: half - 1]
        rest = previous[len(previous) - max(half - 1 - len(hotwords), 0) :]
        previous = (*hotwords, *rest)[: half - 1]
    prefix = tokenizer.encode(" " + options.prefix.strip()) if options.prefix.strip() else ()
    if len(prefix) >= half:
        raise ValueError(f"prefix must have at most {half - 1} tokens, got {len(prefix)}")
    sot = tokenizer.sot_sequence(options.language, options.task, timestamps=options.timestamps)
    return (*((tokenizer.sot_prev, *previous) if previous else ()), *sot, *prefix)


# Search


def _sample(
    task: _DecodingTask, options: DecodingOptions, num_windows: int, best_of: int
) -> list[list[_Hypothesis]]:
    """Decode `best_of` hypotheses for each window, greedily or by random sampling."""
    eot = task.tokenizer.eot
    rows = [_Hypothesis() for _ in range(num_windows * best_of)]
    while True:
        ids, logprobs = task.sample(rows, options)
        rows = [
            row if row.is_done else row.extended(id, logprob, eot)
            for row, id, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True)
        ]
        if all(row.is_done for row in rows) or not task.has_room:
            return [rows[i : i + best_of] for i in range(0, len(rows), best_of)]
        task.decode_step([row.ids[-1] if not row.is_done else eot for row in rows])


def _beam_search(
    task: _DecodingTask, options: DecodingOptions, num_windows: int, beam_size: int
) -> list[list[_Hypothesis]]:
    """Extend the `beam_size` likeliest hypotheses of each window.

    The search ends when `beam_size * options.patience` hypotheses of each window are finished.
    """
    eot, max_finished = task.tokenizer.eot, max(1, round(beam_size * options.patience))
    beams = [[_Hypothesis() for _ in range(beam_size)] for _ in range(num_windows)]
    finished: list[list[_Hypothesis]] = [[] for _ in range(num_windows)]
    is_first = True
    while True:
        # beam_size + 1 tokens per hypothesis: at most one of them is the end of the text.
        rows = [row for beam in beams for row in beam]
        ids, logprobs = task.top_k(rows, options, beam_size + 1)
        sources = []
        for a in range(num_windows):
            # At first the hypotheses of a window are equal, so only one of them is extended.
            candidates = [
                (row.extended(int(id), float(logprob), eot), a * beam_size + b)
                for b, row in enumerate(beams[a][: 1 if is_first else beam_size])
                for id, logprob in zip(
                    ids[a * beam_size + b], logprobs[a * beam_size + b], strict=True
                )
            ]
            candidates.sort(key=lambda candidate: -candidate[0].sum_logprobs)
            selected: list[tuple[_Hypothesis, int]] = []
            for row, source in candidates:
                if len(selected) == beam_size:
                    break
                if not row.is_done:
                    selected.append((row, source))
                elif len(finished[a]) < max_finished:
                    finished[a].append(row)
            beams[a] = [row for row, _ in selected]
            sources += [source for _, source in selected]
        is_first = False
        if all(len(rows) >= max_finished for rows in finished) or not task.has_room:
            break
        task.decode_step([row.ids[-1] for beam in beams for row in beam], sources)
    # A window with too few finished hypotheses is filled up with unfinished ones.
    return [
        (done + unfinished)[: max(beam_size, len(done))]
        for done, unfinished in zip(finished, beams, strict=True)
    ]


def _best_hypothesis(rows: list[_Hypothesis], options: DecodingOptions) -> _Hypothesis:
    """Return the hypothesis with the highest log-probability, normalized by its length."""

    def score(row: _Hypothesis) -> float:
        length = max(len(row.ids), 1)
        if options.length_penalty is None:
            return row.sum_logprobs / length
        return row.sum_logprobs / ((5 + length) / 6) ** options.length_penalty

    return max(rows, key=score)


def _result(
    tokenizer: WhisperTokenizer, row: _Hypothesis, no_speech_prob: float, options: DecodingOptions
) -> DecodingResult:
    text = tokenizer.decode(row.ids).strip()
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
    """Return the UTF-8 size of a text divided by its zlib-compressed size; high if repetitive."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


# Device work


class _DecodingTask:
    """Decoder state of a batch: prefills the prompt, then decodes one token per row and step.

    A row is one hypothesis of a window; all windows have the same number of rows.

    Attributes:
        logits: float32 [B, V], of the next token of each row.
        no_speech_probs: float32 [A], the probability of no speech in each window.
    """

    def __init__(
        self,
        whisper: Whisper,
        audio_features: jax.Array,
        prompt: tuple[int, ...],
        options: DecodingOptions,
        rows_per_audio: int,
        run: RunOnDevice,
    ):
        self.whisper, self.tokenizer, self._run = whisper, whisper.tokenizer, run
        self._options, self._length, self._step = options, len(prompt), 0
        cfg, params = whisper.cfg, whisper.params
        max_new_tokens = options.max_new_tokens or cfg.max_text_len // 2
        num_rows = len(audio_features) * rows_per_audio
        self._end = min(self._length + max_new_tokens, cfg.max_text_len)
        self._keys = jax.random.split(jax.random.key(options.seed), num_rows)
        padded = _bucket_size(self._length, _PROMPT_BUCKETS, cfg.max_text_len)
        ids = np.full((num_rows, padded), self.tokenizer.eot, np.int32)
        ids[:, : self._length] = prompt
        sot = prompt.index(self.tokenizer.sot)
        at = np.array([sot, self._length - 1], np.int32)

        def prefill() -> tuple[jax.Array, Cache]:
            size = _bucket_size(max(padded, self._length + 1), _CACHE_BUCKETS, cfg.max_text_len)
            cache = model.init_cache(
                params, cfg, audio_features, size=size, rows_per_audio=rows_per_audio
            )
            logits, cache = _forward_cached(params, cfg, ids, cache, np.int32(0), at)
            return jax.block_until_ready(logits), cache

        logits, self._cache = run(prefill)
        no_speech = jax.nn.softmax(logits[::rows_per_audio, 0], axis=-1)[
            :, self.tokenizer.no_speech
        ]
        self.no_speech_probs = np.asarray(no_speech)
        self.logits = logits[:, 1]

    @property
    def has_room(self) -> bool:
        """Whether another token fits into the decoder and `max_new_tokens`."""
        return self._length + 1 < self._end

    def decode_step(self, ids: Sequence[int], sources: Sequence[int] | None = None) -> None:
        """Feed one token per row to the decoder and update `logits`.

        Args:
            ids: the token id of each row.
            sources: for each row, the row whose KV cache it continues; None if it is its own.
        """
        cfg, params = self.whisper.cfg, self.whisper.params

        def step() -> tuple[jax.Array, Cache]:
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

        logits, self._cache = self._run(step)
        self.logits = logits[:, 0]
        self._length += 1
        self._step += 1

    def sample(
        self, rows: Sequence[_Hypothesis], options: DecodingOptions
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample one token for each hypothesis in `rows`; return ids and log-probabilities, [B]."""
        constraints = self._constraints(rows)
        temperature = options.temperature
        if temperature:
            ids, logprobs = _sample_ids(
                self.logits, *constraints, self._keys, np.int32(self._step), np.float32(temperature)
            )
        else:
            ids, logprobs = _greedy_ids(self.logits, *constraints)
        return np.asarray(ids), np.asarray(logprobs)

    def top_k(
        self, rows: Sequence[_Hypothesis], options: DecodingOptions, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the `count` likeliest ids, int32 [B, count], and their log-probabilities."""
        logprobs = np.asarray(_constrained_logprobs(self.logits, *self._constraints(rows)))
        top_ids = np.argpartition(-logprobs, count, axis=-1)[:, :count]
        values = np.take_along_axis(logprobs, top_ids, axis=-1)
        order = np.argsort(-values, axis=-1, kind="stable")
        return np.take_along_axis(top_ids, order, -1), np.take_along_axis(values, order, -1)

    def _constraints(
        self, rows: Sequence[_Hypothesis]
    ) -> tuple[np.ndarray, np.ndarray, np.int32, bool]:
        """Return the arguments of `_constrained_logprobs` except the logits."""
        is_first, options = self._step == 0, self._options
        suppressed = _suppress_mask(self.tokenizer, options, self.whisper.cfg.vocab_size, is_first)
        begin, end = self.tokenizer.timestamp_begin, self.whisper.cfg.vocab_size
        if not options.timestamps:
            ranges = [(0, begin, end)] * len(rows)
        elif is_first:
            last = begin + round(options.max_initial_timestamp / TIME_PRECISION)
            ranges = [(begin, begin, last + 1)] * len(rows)
        else:
            ranges = [_allowed_ranges(row.ids, self.tokenizer, end) for row in rows]
        return suppressed, np.array(ranges, np.int32), np.int32(begin), options.timestamps


def _allowed_ranges(
    ids: Sequence[int], tokenizer: WhisperTokenizer, vocab_size: int
) -> tuple[int, int, int]:
    """Return which token ids are allowed after `ids`, as three numbers.

    The numbers are the first allowed text token (all later ones are allowed too), the first allowed
    timestamp token, and the end (exclusive) of the allowed timestamp tokens.

    A text token can be followed by any text token, or by any timestamp after the last one. The
    timestamp that ends a segment must be followed by the end-of-text token, or by the timestamp
    that begins the next segment. That timestamp must be followed by a text token.
    """
    begin = tokenizer.timestamp_begin
    timestamps = [id for id in ids if id >= begin]
    is_timestamp = ids[-1:] and ids[-1] >= begin
    if is_timestamp and (len(ids) < 2 or ids[-2] >= begin):
        return 0, vocab_size, vocab_size
    if is_timestamp:
        return tokenizer.eot, ids[-1], vocab_size
    return 0, timestamps[-1] + 1 if timestamps else begin, vocab_size


@functools.lru_cache(maxsize=16)
def _mask(ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    mask = np.zeros(vocab_size, bool)
    mask[list(ids)] = True
    return mask


def _suppress_mask(
    tokenizer: WhisperTokenizer, options: DecodingOptions, vocab_size: int, is_first: bool
) -> np.ndarray:
    """Return a mask of the tokens to suppress whatever precedes them: bool [V].

    `is_first` is whether the next token is the first generated one, which must not be blank.
    """
    ids = tokenizer.suppress_tokens if options.suppress_non_speech else ()
    if options.timestamps:
        ids = (*ids, tokenizer.no_timestamps)
    if is_first and options.suppress_blank:
        ids = (*ids, *tokenizer.encode(" "), tokenizer.eot)
    return _mask(tuple(ids), vocab_size)


@jax.jit
def _constrained_logprobs(
    logits: jax.Array,
    suppressed: jax.Array,
    ranges: jax.Array,
    begin: jax.Array,
    with_timestamps: bool,
) -> jax.Array:
    """Return log-probabilities under the constraints, float32 [B, V]; -inf for forbidden tokens.

    Args:
        logits: float32 [B, V].
        suppressed: bool [V], tokens that are forbidden in all rows.
        ranges: int32 [B, 3]: the first allowed text token, the first allowed timestamp, and the
            end of the allowed timestamps (exclusive).
        begin: the first timestamp token.
        with_timestamps: whether timestamps are decoded.
    """
    ids = jnp.arange(logits.shape[-1])
    first, low, high = (ranges[:, i, None] for i in range(3))
    is_timestamp = ids >= begin
    allowed = jnp.where(is_timestamp, (ids >= low) & (ids < high), ids >= first) & ~suppressed
    logits = jnp.where(allowed, logits, -jnp.inf)
    timestamps = jax.nn.logsumexp(jnp.where(is_timestamp, logits, -jnp.inf), axis=-1, keepdims=True)
    best_text = jnp.max(jnp.where(is_timestamp, -jnp.inf, logits), axis=-1, keepdims=True)
    is_excluded = with_timestamps & (timestamps > best_text) & ~is_timestamp
    logits = jnp.where(is_excluded, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


@jax.jit
def _greedy_ids(logits: jax.Array, *constraints) -> tuple[jax.Array, jax.Array]:
    """Return the likeliest token of each row under the constraints, and its log-probability."""
    logprobs = _constrained_logprobs(logits, *constraints)
    best = logprobs.max(axis=-1)
    # Equals argmax, which XLA does not vectorize on CPU; it took half of the time of this function.
    ids = jnp.arange(logits.shape[-1])
    return jnp.where(logprobs == best[:, None], ids, len(ids)).min(axis=-1), best


@jax.jit
def _sample_ids(logits: jax.Array, *rest) -> tuple[jax.Array, jax.Array]:
    """Sample a token per row under the constraints; log-probabilities are at temperature 1."""
    *constraints, keys, step, temperature = rest
    logprobs = _constrained_logprobs(logits, *constraints)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    # Inverse transform sampling with one random number per row. jax.random.categorical draws one
    # for each token of the vocabulary and takes four times as long.
    uniforms = jax.vmap(jax.random.uniform)(keys)
    cdf = jnp.cumsum(jax.nn.softmax(logprobs / temperature, axis=-1), axis=-1)
    ids = (cdf <= (uniforms * cdf[:, -1])[:, None]).sum(axis=-1)
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


def _bucket_size(length: int, buckets: Sequence[int], limit: int) -> int:
    """Return the first bucket that holds `length` and does not exceed `limit`, or else `limit`."""
    return next((bucket for bucket in buckets if length <= bucket <= limit), limit)
