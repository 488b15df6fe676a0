"""A model that draws for requests: prompts in, pictures out, a denoising step a turn of the device.

Pictures are drawn in batches, of one request or of several, because that is cheaper: on two cores a
step takes 22 ms of processor time alone, and 8 ms for each of eight side by side. A batch is begun
a moment after there is something to draw, with as many as wait and go together, and walks its
levels to the end; who comes later waits for the next one. Two take turns, so that a picture can
begin while others are half done. Those of one request wait one a turn, behind others' first ones.

A batch is filled up to 1, 2, 4 or 8 rows, so that there are few programs; those of 1 are compiled
when the model is loaded, others at first use, beside the device's thread. Another size rounds the
last bits otherwise, which shows in a few bytes of a picture, by one. So a request with a seed
shares its batches with nobody: it gets the same bytes again under any load.

Leaves out: pictures that join a batch on its way, for which a batch would have to hold many levels.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import math
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import bpe
import diffusion
from diffusion import DiffusionPipeline, SamplerOptions, edit
from diffusion.text import MAX_TOKENS
from serve.models import fingerprint
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.spec import Example, Kind, LoadOptions, ModelFiles, ModelSpec, stamp_of
from transformer.checkpoint.safetensors import read_json_object
from transformer.engine.device import WorkQueue, default_device
from transformer.engine.requests import Busy

BATCH_SIZES = (1, 2, 4, 8)  # of a batch
MAX_MASKED_BATCH_SIZE = 4  # with masks: a step of theirs looks several times, and must stay short
MAX_BATCHES = 2  # at a time
BATCH_WAIT_SECONDS = 0.02  # seconds that a picture waits for others to begin with
MAX_WAITING = 128  # pictures; a quarter of them one client's
_INITIAL_BATCH_SECONDS = 2.0  # that a batch takes, until one was seen


@dataclass(frozen=True, eq=False)
class InitImage:
    """What a picture is drawn from; see `diffusion.edit.steps`.

    Attributes:
        picture: float32 [Y, X, 3], at the size of the denoiser.
        mask: float32 [Y, X, 1]; None for all of it.
        strength: how far back to noise it goes.
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRequest:
    """What a request wants to have drawn.

    Attributes:
        count: how many pictures.
        seed: for the same pictures again; None for any.
        shown: how many pictures on the way are wanted of each.
        source: what they are drawn from, if not from noise alone.
        client: who asks.
    """

    prompt: str
    num_images: int = 1
    seed: int | None = None
    plan: SamplerOptions = field(default_factory=SamplerOptions)
    num_partial_images: int = 0
    init_image: InitImage | None = None
    client: str = ""

    @property
    def max_batch_size(self) -> int:
        """How many pictures of such orders are drawn side by side at most."""
        return (
            MAX_MASKED_BATCH_SIZE
            if self.init_image and self.init_image.mask is not None
            else BATCH_SIZES[-1]
        )

    @property
    def num_steps(self) -> int:
        """How many steps it takes."""
        strength = self.init_image.strength if self.init_image else 1.0
        return max(1, round(strength * self.plan.steps))


@dataclass(frozen=True, slots=True)
class ImageOutput:
    """A picture of an order.

    Attributes:
        index: which of them.
        shown: which of those on the way, from 0: what the network then saw behind the noise. None
            for the finished one.
        pixels: uint8 [Y, X, 3].
    """

    index: int
    partial_index: int | None
    pixels: np.ndarray


@dataclass(eq=False)
class _QueuedImage:
    """One picture of an order."""

    request: ImageRequest
    index: int
    seed: int
    outputs: asyncio.Queue[ImageOutput | Exception]
    admission_round: int
    is_active: bool = True

    @functools.cached_property
    def batch_key(self) -> object:
        """Rows of the same group can be drawn side by side."""
        if self.request.seed is not None:
            return id(self.request)
        source = self.request.init_image
        return self.request.plan, source and (source.strength, source.mask is None)

    @functools.cached_property
    def partial_steps(self) -> dict[int, int]:
        """After which steps it is shown, and as which picture on the way."""
        order = self.request
        steps = {
            round(order.num_steps * (k + 1) / (order.num_partial_images + 1))
            for k in range(order.num_partial_images)
        }
        return {step: k for k, step in enumerate(sorted(steps - {0, order.num_steps}))}


@dataclass(kw_only=True, eq=False)
class ImageModel:
    """A painter in memory. Its siblings are `ServedModel`, `EmbeddingModel` and `SpeechModel`.

    To be asked from one event loop.
    """

    kind: ClassVar[str] = "images"

    id: str
    created: int  # seconds since 1970
    owned_by: str
    pipeline: DiffusionPipeline = field(repr=False)
    tokenizer: bpe.WordPiece = field(repr=False)  # of the encoder that reads prompts
    memory: int  # bytes of weights
    fingerprint: str
    dtype: str = "float32"
    notify: Callable[[str], None] = lambda line: None  # told a line when something takes long
    work_queue: WorkQueue = field(default_factory=lambda: WorkQueue(default_device()))
    _waiting: list[_QueuedImage] = field(default_factory=list)
    _batches: set[asyncio.Task[None]] = field(default_factory=set)
    _compiled: set[object] = field(default_factory=set)
    _compiling: threading.Lock = field(default_factory=threading.Lock)
    _batch_seconds: float = _INITIAL_BATCH_SECONDS  # that the last batch took

    @property
    def context(self) -> int:
        """Tokens of a prompt that are read."""
        return MAX_TOKENS

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for it."""
        return not (self._waiting or self._batches) and self.work_queue.is_idle

    def count_tokens(self, prompt: str) -> int:
        """How many tokens of a prompt are read."""
        return len(self.tokenizer.encode(prompt, max_length=MAX_TOKENS))

    async def generate(self, request: ImageRequest) -> AsyncGenerator[ImageOutput, None]:
        """Yields pictures of an order as they come: those on the way, and the finished ones.

        Closing it ends the work soon.

        Raises:
            Busy: too many pictures wait, or too many of this client's.
            Exception: what went wrong with them.
        """
        rows = self._admit(request)
        try:
            left = request.num_images
            while left:
                drawn = await rows[0].outputs.get()
                if isinstance(drawn, Exception):
                    raise drawn
                left -= drawn.partial_index is None
                yield drawn
        finally:
            for row in rows:
                row.is_active = False
            self._waiting = [row for row in self._waiting if row.is_active]

    def compile(self, size: int, request: ImageRequest) -> None:
        """Sees to it that orders like this can be drawn so many at a time. Blocks, for seconds."""
        kind = size, request.init_image and request.init_image.mask is None
        if kind in self._compiled:
            return
        with self._compiling:
            if kind in self._compiled:  # by whom we waited for
                return
            if self._compiled:
                self.notify(f"compiling {self.id} for batches of {size} (once) ...")
            # Few, but every kind of step is among them; the strength changes numbers, not programs.
            source = request.init_image and replace(request.init_image, strength=1.0)
            short = replace(request, plan=replace(request.plan, steps=6), source=source)
            for noisy, _ in denoise_batch(self.pipeline, [(short, 0, 0)], size):
                self.pipeline.postprocess(noisy)
            self._compiled.add(kind)

    def close(self, timeout: float) -> None:
        """Nothing to end: a step in hand is short, and who waits is answered."""

    # -- whose turn it is ----------------------------------------------------------------------

    def _admit(self, order: ImageRequest) -> list[_QueuedImage]:
        own = sum(row.request.client == order.client for row in self._waiting)
        wait = math.ceil(len(self._waiting) / BATCH_SIZES[-1] / MAX_BATCHES) * self._batch_seconds
        if own + order.num_images > MAX_WAITING // 4:
            raise Busy(wait, own)
        if len(self._waiting) + order.num_images > MAX_WAITING:
            raise Busy(wait)
        seed = secrets.randbits(31) if order.seed is None else order.seed
        first = self._waiting[0].admission_round if self._waiting else 0
        drawn: asyncio.Queue[ImageOutput | Exception] = asyncio.Queue()
        rows = [
            _QueuedImage(order, index, seed, drawn, first + index)
            for index in range(order.num_images)
        ]
        for row in rows:
            bisect.insort_right(self._waiting, row, key=lambda other: other.admission_round)
        asyncio.get_running_loop().call_later(BATCH_WAIT_SECONDS, self._start_batches)
        return rows

    def _start_batches(self) -> None:
        """Makes batches of who waits, as many as may be drawn at a time."""
        while self._waiting and len(self._batches) < MAX_BATCHES:
            group = self._waiting[0].batch_key
            rows = [row for row in self._waiting if row.batch_key == group]
            rows = rows[: rows[0].request.max_batch_size]
            self._waiting = [row for row in self._waiting if row not in rows]
            task = asyncio.create_task(self._run_batch(rows))
            self._batches.add(task)
            task.add_done_callback(self._on_batch_done)

    def _on_batch_done(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._start_batches()

    # -- drawing -------------------------------------------------------------------------------

    async def _run_batch(self, rows: Sequence[_QueuedImage]) -> None:
        """A batch, from its first step to the last, or until nobody wants it any more."""
        try:
            await asyncio.to_thread(self.compile, padded_batch_size(len(rows)), rows[0].request)
            began = time.monotonic()
            with self.work_queue.using():
                pictures = [(row.request, row.seed, row.index) for row in rows]
                steps = denoise_batch(self.pipeline, pictures)
                last = rows[0].request.num_steps
                for number in range(1, last + 1):
                    if not any(row.is_active for row in rows):
                        return
                    noisy, clean = await self.work_queue.run(functools.partial(next, steps))
                    shown = [row for row in rows if number == last or number in row.partial_steps]
                    if not shown:
                        continue
                    seen = noisy if number == last else clean
                    pixels = await self.work_queue.run(
                        functools.partial(self.pipeline.postprocess, seen)
                    )
                    for row, own in zip(rows, pixels, strict=False):  # the rest filled it up
                        if row in shown:
                            row.outputs.put_nowait(
                                ImageOutput(row.index, row.partial_steps.get(number), own)
                            )
            self._batch_seconds = time.monotonic() - began
        except Exception as error:
            for row in rows:
                row.outputs.put_nowait(error)


def denoise_batch(
    pipeline: DiffusionPipeline,
    rows: Sequence[tuple[ImageRequest, int, int]],
    size: int | None = None,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Draw a batch, a step at a time, each computed when it is yielded.

    Args:
        rows: orders of one plan and strength, each with its seed and the index of its picture.
        size: of the batch, one of `SIZES`; None for the least that holds the rows.
    """
    size = size or padded_batch_size(len(rows))
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    prompts = [order.prompt for order, _, _ in filled]
    # As `sample.keys_of`, whose number i does not depend on how many there are.
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), index) for _, seed, index in filled])
    plan = rows[0][0].plan
    sources = [order.init_image for order, _, _ in filled if order.init_image]
    if not sources:
        steps = pipeline.steps(prompts, keys, plan)
    else:
        masks = [source.mask for source in sources if source.mask is not None]
        steps = edit.steps(
            pipeline,
            prompts,
            keys,
            plan,
            images=np.stack([source.image for source in sources]),
            masks=np.stack(masks) if masks else None,
            strength=sources[0].strength,
        )
    for step in steps:
        yield jax.block_until_ready(step)


def padded_batch_size(rows: int) -> int:
    """Return the least size of a batch that holds so many rows."""
    return next(size for size in BATCH_SIZES if size >= rows)


def load_image_model(
    id: str,
    path: Path,
    encoder: Path,
    *,
    owned_by: str,
    notify: Callable[[str], None] = lambda line: None,
) -> ImageModel:
    """Loads a model that draws, and compiles what draws one picture.

    Args:
        path: a folder with `denoiser` and `upscaler`.
        encoder: the folder of the encoder that its denoiser was trained with.
        notify: told one line for each thing that takes long.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or the encoder is another one.
    """
    enable_compilation_cache()
    painter = diffusion.load(path, encoder)
    parts = [path / "denoiser", path / "upscaler", encoder]
    arrays = jax.tree.leaves((painter.denoiser, painter.upscaler))
    model = ImageModel(
        id=id,
        created=int((path / "denoiser" / "config.json").stat().st_mtime),
        owned_by=owned_by,
        pipeline=painter,
        tokenizer=bpe.load_wordpiece(encoder),
        memory=sum(a.nbytes for a in arrays) + (encoder / "model.safetensors").stat().st_size,
        fingerprint=fingerprint.system_fingerprint(
            " ".join(map(fingerprint.hash_weights, parts)), "float32"
        ),
        notify=notify,
    )
    model.compile(1, ImageRequest(prompt=""))
    return model


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """See `Kind.describe`."""
    assert files.encoder is not None
    encoder = files.encoder
    parts = [files.path / "denoiser", files.path / "upscaler", encoder]
    weights = [part / "model.safetensors" for part in parts]
    for part in parts:
        read_json_object(part / "config.json")  # raises now, not when somebody asks

    def load() -> ImageModel:
        return load_image_model(
            files.id, files.path, encoder, owned_by=files.publisher, notify=options.notify
        )

    return ModelSpec(
        id=files.id,
        created=int((parts[0] / "config.json").stat().st_mtime),
        owned_by=files.publisher,
        memory=lambda: 2 * sum(path.stat().st_size for path in weights),  # stored in half as much
        load=load,
        stamp=functools.partial(stamp_of, *parts),
        kind="images",
    )


def _recognizes(path: Path) -> bool:
    """Whether a folder has the layout of `diffusion`."""
    return all((path / name / "config.json").is_file() for name in ("denoiser", "upscaler"))


KIND = Kind(
    name="images",
    task="draw pictures",
    recognizes=_recognizes,
    describe=describe,
    example=lambda model: Example(
        route="images/generations",
        call="images.generate",
        result="data[0].url",
        fields={"prompt": "a red apple"},
    ),
    has_encoder=True,
)
