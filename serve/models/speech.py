"""A Whisper that answers requests: sound in, segments out, its pieces of work among everybody's.

`audio.transcribe` is ordinary code that a worker thread runs; what it has a device for (a window
encoded, a step of the decoder) it hands through `lane.call`, and so takes turns with all models.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

import audio
from audio import decode, model
from audio.checkpoint import is_whisper
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
from transformer.checkpoint import Dtype
from transformer.engine.device import WorkQueue, default_device

# int8 takes the decoder a little less time for each token; but of 179 words that people read,
# whisper-tiny.en wrote 7 otherwise than in float32, and 1 in bfloat16. So "auto" is one of two.
_PROBE_TOKENS = 24  # about a sentence
# A narrower format serves if what may come next is as in float32. Measured: tiny.en and base in
# bfloat16 0.0001 to 0.001, in int8 0.004 to 0.07.
MAX_DIVERGENCE = 0.002


@dataclass(frozen=True, kw_only=True)
class SpeechModel:
    """A Whisper in memory. Its siblings are `ServedModel` and `EmbeddingModel`."""

    kind: ClassVar[str] = "speech"

    id: str
    created: int  # seconds since 1970
    owned_by: str
    whisper: audio.Whisper = field(repr=False)
    fingerprint: str
    dtype: str
    work_queue: WorkQueue = field(default_factory=lambda: WorkQueue(default_device()))

    @property
    def context(self) -> int:
        """Tokens of prompt and text of a window together."""
        return self.whisper.cfg.max_text_len

    @property
    def memory(self) -> int:
        """Bytes of weights."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.whisper.params))

    @property
    def is_idle(self) -> bool:
        """Whether nobody is being answered by it."""
        return self.work_queue.is_idle

    def detect_language(
        self, samples: np.ndarray, language: str | None, plan: TranscriptionOptions
    ) -> tuple[str, Sequence[Span]]:
        """The language of a sound, heard if not given, and where in it anybody speaks. Blocks.

        Raises:
            ValueError: the model does not know the language.
            Busy: too much waits for the device.
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
        """Yields the segments of a sound as they are written, until `stop` is set. Blocks.

        Raises:
            ValueError: the model does not know the language or task.
            Busy: too much waits for the device.
        """

        def run(piece):
            if stop.is_set():
                raise Stopped
            return self.work_queue.run_sync(piece)

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
        """Nothing to end: a piece in hand is short, and who waits is answered."""


class Stopped(Exception):
    """Nobody waits for the rest of a transcript."""


def load_speech_model(
    id: str,
    path: Path,
    *,
    owned_by: str,
    dtype: str = "auto",
    notify: Callable[[str], None] = lambda line: None,
) -> SpeechModel:
    """Loads a Whisper.

    Args:
        path: a folder of Hugging Face's or CTranslate2's layout, with a tokenizer.json.
        dtype: one of `dtypes.FORMATS`, or "auto" for the faster of `dtypes.FLOATS` on this machine.
        notify: told one line for each thing that takes long.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind.
    """
    enable_compilation_cache()
    format = dtypes.parse_dtype(dtype, dtypes.DTYPES)
    weights = fingerprint.hash_weights(path)
    if format is None:
        name = fingerprint.machine_key(weights)
        format = dtypes.fastest_dtype(
            id,
            name,
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
        whisper=audio.load_model(path, dtype=format),
        fingerprint=fingerprint.system_fingerprint(weights, format),
        dtype=format,
    )


def _measure(path: Path, format: Dtype) -> tuple[float, np.ndarray]:
    """Seconds of a window with a sentence, and the log-probabilities before each of its tokens."""
    whisper = audio.load_model(path, dtype=format)
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(1, whisper.cfg.num_frames, whisper.cfg.num_mels)).astype(np.float32)
    ids = rng.integers(0, whisper.tokenizer.eot, _PROBE_TOKENS).tolist()
    best, logits = math.inf, np.zeros(0)
    for _ in range(3):  # the first one compiles
        started = time.perf_counter()
        sound = model.encode(whisper.params, whisper.cfg, mel)[0]
        logits = decode.teacher_forced_logits(whisper, sound, ids, audio.DecodingOptions())
        best = min(best, time.perf_counter() - started)
    return best, np.asarray(jax.nn.log_softmax(logits, axis=-1))


def _kl_divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the mean Kullback-Leibler divergence of log-probabilities [T, V], in nats."""
    return float((np.exp(expected) * (expected - actual)).sum(axis=-1).mean())


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """See `Kind.describe`."""
    weights = [files.path / name for name in ("model.bin", "model.safetensors")]

    def load() -> SpeechModel:
        return load_speech_model(
            files.id,
            files.path,
            owned_by=files.publisher,
            dtype=options.dtype if options.dtype in dtypes.DTYPES else "auto",
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
    )


def _recognizes(path: Path) -> bool:
    if not is_whisper(path):
        return False
    if any(path.glob("*.safetensors")):
        return True
    try:
        with (path / "model.bin").open("rb") as file:  # CTranslate2's layout: no pickle
            return file.read(18)[6:] == b"WhisperSpec\0"  # behind a version and a length
    except FileNotFoundError:
        return False


KIND = Kind(
    name="speech",
    task="write down speech",
    recognizes=_recognizes,
    describe=describe,
    example=lambda model: Example(
        route="audio/transcriptions",
        call="audio.transcriptions.create",
        result="text",
        file="speech.wav",
    ),
)
