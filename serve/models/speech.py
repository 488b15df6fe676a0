"""Whisper models: audio in, transcript segments out, one device call per work item.

`audio.transcribe` is synchronous code that a worker thread runs. It passes each call to the device
(the encoder of a window, a decoding step) to `WorkQueue.run_sync`, and so shares the device with
the other models.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, get_args

import jax
import numpy as np

import audio
from audio import decode, model
from audio.checkpoint import Dtype, is_whisper
from audio.transcribe import (
    Segment,
    TranscriptionOptions,
    find_language,
    find_speech,
    generate_segments,
)
from audio.vad import Span
from serve.models import dtypes, fingerprint
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.decoder import weights_file
from serve.models.spec import Example, Kind, LoadOptions, ModelFiles, ModelSpec, stamp_of
from transformer.engine.device import WorkQueue, default_device

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
# "auto" is float32 or bfloat16. int8 is a little faster per token, but of 179 spoken words
# whisper-tiny.en transcribed 7 differently from float32, against 1 in bfloat16.
_PROBE_TOKENS = 24  # about a sentence
# A narrower dtype is accepted if its next-token distributions are close to float32's. Measured for
# tiny.en and base: 0.0001 to 0.001 in bfloat16, 0.004 to 0.07 in int8.
MAX_DIVERGENCE = 0.002


@dataclass(frozen=True, kw_only=True)
class SpeechModel:
    """A loaded Whisper model.

    Attributes:
        id: the id it is served under.
        created: seconds since 1970.
        owned_by: the publisher.
        whisper: weights, configuration and tokenizer.
        fingerprint: changes with weights, dtype and library versions.
        dtype: the dtype of its weights.
        work_queue: its queue of work items on the device.
    """

    kind: ClassVar[str] = "speech"

    id: str
    created: int
    owned_by: str
    whisper: audio.Whisper = field(repr=False)
    fingerprint: str
    dtype: str
    work_queue: WorkQueue = field(default_factory=lambda: WorkQueue(default_device()))

    @property
    def context(self) -> int:
        """Return the maximum tokens of a window: prompt and transcript together."""
        return self.whisper.cfg.max_text_len

    @property
    def memory(self) -> int:
        """Return the bytes of the weights."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.whisper.params))

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return self.work_queue.is_idle

    def detect_language(
        self, samples: np.ndarray, language: str | None, plan: TranscriptionOptions
    ) -> tuple[str, Sequence[Span]]:
        """Return the language of a recording and its spans of speech. Blocks.

        Args:
            samples: float32 [N], mono, 16 kHz.
            language: the language if it is known; None to detect it.
            plan: whether and how to detect speech.

        Raises:
            ValueError: the model does not know the language.
            Busy: too many work items wait.
        """
        spans = find_speech(samples, plan)
        with self.work_queue.using():
            code = find_language(
                self.whisper, samples, language, spans, run=self.work_queue.run_sync
            )
        return code, spans

    def transcribe(
        self,
        samples: np.ndarray,
        options: audio.DecodingOptions,
        plan: TranscriptionOptions,
        spans: Sequence[Span],
        *,
        stop: threading.Event,
    ) -> Iterator[Segment]:
        """Yield the segments of a recording as they are transcribed, until `stop` is set. Blocks.

        Args:
            samples: float32 [N], mono, 16 kHz.
            options: how to decode a window.
            plan: how to split the recording.
            spans: the spans of speech, as `detect_language` returns them.
            stop: set by another thread to end the transcription.

        Raises:
            ValueError: the model does not know the language or task.
            Busy: too many work items wait.
        """

        def run(function):
            if stop.is_set():
                raise Stopped
            return self.work_queue.run_sync(function)

        with self.work_queue.using():
            try:
                yield from generate_segments(
                    self.whisper,
                    samples,
                    options=options,
                    transcription_options=plan,
                    spans=spans,
                    run=run,
                )
            except Stopped:
                return

    def close(self, timeout: float) -> None:
        """Do nothing: a work item is short, and waiting requests are still answered."""


class Stopped(Exception):
    """Raised in the worker thread to end a transcription whose rest is not needed."""


def load_speech_model(
    id: str,
    path: Path,
    *,
    owned_by: str,
    dtype: str = "auto",
    notify: Callable[[str], None] = lambda line: None,
) -> SpeechModel:
    """Load a Whisper model.

    Args:
        id: the id to serve it under.
        path: a folder of Hugging Face's or CTranslate2's layout, with a tokenizer.json.
        owned_by: the publisher.
        dtype: one of `DTYPES`, or "auto" for the faster of `dtypes.FLOAT_DTYPES` on this
            machine.
        notify: called with a message for each slow operation.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind.
    """
    enable_compilation_cache()
    chosen = dtypes.parse_dtype(dtype, DTYPES)
    weights = fingerprint.hash_weights(path)
    if chosen is None:
        key = fingerprint.machine_key(weights)
        chosen = dtypes.fastest_dtype(
            id,
            key,
            dtypes.FLOAT_DTYPES,
            functools.partial(_measure, path),
            _kl_divergence,
            MAX_DIVERGENCE,
            notify,
        )
    return SpeechModel(
        id=id,
        created=int(weights_file(path).stat().st_mtime),
        owned_by=owned_by,
        whisper=audio.load_model(path, dtype=chosen),
        fingerprint=fingerprint.system_fingerprint(weights, chosen),
        dtype=chosen,
    )


def _measure(path: Path, dtype: Dtype) -> tuple[float, np.ndarray]:
    """Return the time of a forward pass, in seconds, and its log-probabilities [T, V].

    The inputs are random audio and T random tokens.
    """
    whisper = audio.load_model(path, dtype=dtype)
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(1, whisper.cfg.num_frames, whisper.cfg.num_mels)).astype(np.float32)
    ids = rng.integers(0, whisper.tokenizer.eot, _PROBE_TOKENS).tolist()
    best, logits = math.inf, np.zeros(0)
    for _ in range(3):  # the first one compiles
        started = time.perf_counter()
        features = model.encode(whisper.params, whisper.cfg, mel)[0]
        logits = decode.teacher_forced_logits(whisper, features, ids, audio.DecodingOptions())
        best = min(best, time.perf_counter() - started)
    return best, np.asarray(jax.nn.log_softmax(logits, axis=-1))


def _kl_divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the mean Kullback-Leibler divergence of log-probabilities [T, V], in nats."""
    return float((np.exp(expected) * (expected - actual)).sum(axis=-1).mean())


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """Return the spec of a Whisper model; see `Kind.describe`."""
    weights = [files.path / name for name in ("model.bin", "model.safetensors")]

    def load() -> SpeechModel:
        return load_speech_model(
            files.id,
            files.path,
            owned_by=files.publisher,
            dtype=options.dtype if options.dtype in DTYPES else "auto",
            notify=options.notify,
        )

    return ModelSpec(
        id=files.id,
        created=int(weights_file(files.path).stat().st_mtime),
        owned_by=files.publisher,
        memory=lambda: sum(path.stat().st_size for path in weights if path.is_file()),
        load=load,
        stamp=functools.partial(stamp_of, files.path),
        kind="speech",
        context=(files.entry.context or None) if files.entry else None,
        capabilities=files.entry.serves if files.entry else (),
    )


def _recognizes(path: Path) -> bool:
    if not is_whisper(path):
        return False
    if any(path.glob("*.safetensors")):
        return True
    try:
        with (path / "model.bin").open("rb") as file:  # CTranslate2's layout, not a pickle
            return file.read(18)[6:] == b"WhisperSpec\0"  # after a version and a length
    except FileNotFoundError:
        return False


KIND = Kind(
    name="speech",
    task="transcribe speech",
    recognizes=_recognizes,
    describe=describe,
    example=lambda model: Example(
        route="audio/transcriptions",
        call="audio.transcriptions.create",
        result="text",
        file="speech.wav",
    ),
)
