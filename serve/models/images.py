"""Image models: prompts in, images out, one denoising step of a batch per work item.

Images of one or several requests are generated in batches, which is cheaper: on two cores a step
takes 22 ms of CPU time for one image, and 8 ms per image in a batch of eight. A batch starts a
moment after the first image is queued, with all queued images that can share a batch, and runs
through all noise levels. Later requests join the next batch; at most two batches run at a time, so
that an image can start while others are half done. The queue is round-robin over requests: it
takes one image of each waiting request, then the second image of each, and so on.

A batch is padded to 1, 2, 4 or 8 images, so that few programs are compiled: those for one image
when the model is loaded, the others at first use, outside the device thread. Programs of different
batch sizes round differently, which changes a few bytes of an image by one. So a request with a
seed does not share a batch with other requests: it gives the same bytes under any load.

Leaves out: images that join a running batch, which would mix several noise levels in a batch.
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

BATCH_SIZES = (1, 2, 4, 8)
MAX_MASKED_BATCH_SIZE = 4  # with masks, a step runs the network several times and must stay short
MAX_BATCHES = 2  # that run at the same time
BATCH_WAIT_SECONDS = 0.02  # from the first queued image to the start of its batch
MAX_WAITING = 128  # images in the queue; at most a quarter of them for one client
_INITIAL_BATCH_SECONDS = 2.0  # estimated duration of a batch before the first one ended


@dataclass(frozen=True, eq=False)
class InitImage:
    """The image that an edit or variation starts from; see `diffusion.edit.steps`.

    Attributes:
        image: float32 [Y, X, 3], at the size of the denoiser.
        mask: float32 [Y, X, 1], the area to change; None for the whole image.
        strength: the noise level to start from, from 0 (the image itself) to 1 (pure noise).
    """

    image: np.ndarray
    mask: np.ndarray | None = None
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRequest:
    """A request for images.

    Attributes:
        prompt: the text of the prompt.
        num_images: the number of images.
        seed: the seed, for reproducible images; None for a random one.
        plan: the options of the sampler.
        num_partial_images: the number of partial images to deliver before each final image.
        init_image: the image to start from; None to start from noise.
        client: the name of the client, to limit the queued images of each client.
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
        """Return the maximum size of a batch that contains this request."""
        return (
            MAX_MASKED_BATCH_SIZE
            if self.init_image and self.init_image.mask is not None
            else BATCH_SIZES[-1]
        )

    @property
    def num_steps(self) -> int:
        """Return the number of denoising steps."""
        strength = self.init_image.strength if self.init_image else 1.0
        return max(1, round(strength * self.plan.steps))


@dataclass(frozen=True, slots=True)
class ImageOutput:
    """A partial or final image of a request.

    Attributes:
        index: the index of the image in its request.
        partial_index: the index of a partial image, from 0; None for the final image. A partial
            image is the network's estimate of the denoised image.
        pixels: uint8 [Y, X, 3].
    """

    index: int
    partial_index: int | None
    pixels: np.ndarray


@dataclass(eq=False)
class _QueuedImage:
    """One image of a request, in the queue or in a batch."""

    request: ImageRequest
    index: int
    seed: int
    outputs: asyncio.Queue[ImageOutput | Exception]
    admission_round: int
    is_active: bool = True

    @functools.cached_property
    def batch_key(self) -> object:
        """Return a key; images with equal keys can share a batch."""
        if self.request.seed is not None:
            return id(self.request)
        source = self.request.init_image
        return self.request.plan, source and (source.strength, source.mask is None)

    @functools.cached_property
    def partial_steps(self) -> dict[int, int]:
        """Return the steps after which partial images are delivered.

        Returns:
            A dict from each such step to the index of its partial image.
        """
        request = self.request
        steps = {
            round(request.num_steps * (k + 1) / (request.num_partial_images + 1))
            for k in range(request.num_partial_images)
        }
        return {step: k for k, step in enumerate(sorted(steps - {0, request.num_steps}))}


@dataclass(kw_only=True, eq=False)
class ImageModel:
    """A loaded image model. Use it from one event loop.

    Attributes:
        id: the id it is served under.
        created: seconds since 1970.
        owned_by: the publisher.
        pipeline: denoiser, upscaler and text encoder.
        tokenizer: the tokenizer of the text encoder.
        memory: bytes of weights.
        fingerprint: changes with weights and library versions.
        dtype: the dtype of its weights.
        notify: called with a message for each slow operation.
        work_queue: its queue of work items on the device.
    """

    kind: ClassVar[str] = "images"

    id: str
    created: int
    owned_by: str
    pipeline: DiffusionPipeline = field(repr=False)
    tokenizer: bpe.WordPiece = field(repr=False)
    memory: int
    fingerprint: str
    dtype: str = "float32"
    notify: Callable[[str], None] = lambda line: None
    work_queue: WorkQueue = field(default_factory=lambda: WorkQueue(default_device()))
    _waiting: list[_QueuedImage] = field(default_factory=list)
    _batches: set[asyncio.Task[None]] = field(default_factory=set)
    _compiled: set[object] = field(default_factory=set)
    _compiling: threading.Lock = field(default_factory=threading.Lock)
    _batch_seconds: float = _INITIAL_BATCH_SECONDS  # duration of the last batch

    @property
    def context(self) -> int:
        """Return the maximum tokens of a prompt; the tokens after them are ignored."""
        return MAX_TOKENS

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not (self._waiting or self._batches) and self.work_queue.is_idle

    def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt, at most `context`."""
        return len(self.tokenizer.encode(prompt, max_length=MAX_TOKENS))

    async def generate(self, request: ImageRequest) -> AsyncGenerator[ImageOutput, None]:
        """Yield the partial and final images of a request as they are computed.

        Closing the iterator cancels the remaining work.

        Raises:
            Busy: too many images are queued, in total or by this client.
            Exception: any error of the computation.
        """
        rows = self._admit(request)
        try:
            remaining = request.num_images
            while remaining:
                output = await rows[0].outputs.get()
                if isinstance(output, Exception):
                    raise output
                remaining -= output.partial_index is None
                yield output
        finally:
            for row in rows:
                row.is_active = False
            self._waiting = [row for row in self._waiting if row.is_active]

    def compile(self, size: int, request: ImageRequest) -> None:
        """Compile the programs for a batch size, unless they are compiled. Blocks for seconds.

        Args:
            size: the batch size.
            request: an example; requests with an image, or with a mask, have their own programs.
        """
        kind = size, request.init_image and request.init_image.mask is None
        if kind in self._compiled:
            return
        with self._compiling:
            if kind in self._compiled:  # by another thread meanwhile
                return
            if self._compiled:
                self.notify(f"compiling {self.id} for batches of {size} (once) ...")
            # Six steps run every program; the strength changes values, not programs.
            init_image = request.init_image and replace(request.init_image, strength=1.0)
            short = replace(request, plan=replace(request.plan, steps=6), init_image=init_image)
            for noisy, _ in denoise_batch(self.pipeline, [(short, 0, 0)], size):
                self.pipeline.postprocess(noisy)
            self._compiled.add(kind)

    def close(self, timeout: float) -> None:
        """Do nothing: a step is short, and waiting requests are still answered."""

    # -- queue ---------------------------------------------------------------------------------

    def _admit(self, request: ImageRequest) -> list[_QueuedImage]:
        num_waiting = sum(row.request.client == request.client for row in self._waiting)
        retry_after = (
            math.ceil(len(self._waiting) / BATCH_SIZES[-1] / MAX_BATCHES) * self._batch_seconds
        )
        if num_waiting + request.num_images > MAX_WAITING // 4:
            raise Busy(retry_after, num_waiting)
        if len(self._waiting) + request.num_images > MAX_WAITING:
            raise Busy(retry_after)
        seed = secrets.randbits(31) if request.seed is None else request.seed
        first = self._waiting[0].admission_round if self._waiting else 0
        outputs: asyncio.Queue[ImageOutput | Exception] = asyncio.Queue()
        rows = [
            _QueuedImage(request, index, seed, outputs, first + index)
            for index in range(request.num_images)
        ]
        for row in rows:
            bisect.insort_right(self._waiting, row, key=lambda other: other.admission_round)
        asyncio.get_running_loop().call_later(BATCH_WAIT_SECONDS, self._start_batches)
        return rows

    def _start_batches(self) -> None:
        """Start batches of waiting images, up to `MAX_BATCHES`."""
        while self._waiting and len(self._batches) < MAX_BATCHES:
            batch_key = self._waiting[0].batch_key
            rows = [row for row in self._waiting if row.batch_key == batch_key]
            rows = rows[: rows[0].request.max_batch_size]
            self._waiting = [row for row in self._waiting if row not in rows]
            task = asyncio.create_task(self._run_batch(rows))
            self._batches.add(task)
            task.add_done_callback(self._on_batch_done)

    def _on_batch_done(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._start_batches()

    # -- computation ---------------------------------------------------------------------------

    async def _run_batch(self, rows: Sequence[_QueuedImage]) -> None:
        """Run a batch to its last step, or until all its requests are closed."""
        try:
            await asyncio.to_thread(self.compile, padded_batch_size(len(rows)), rows[0].request)
            started = time.monotonic()
            with self.work_queue.using():
                images = [(row.request, row.seed, row.index) for row in rows]
                steps = denoise_batch(self.pipeline, images)
                num_steps = rows[0].request.num_steps
                for step in range(1, num_steps + 1):
                    if not any(row.is_active for row in rows):
                        return
                    noisy, clean = await self.work_queue.run(functools.partial(next, steps))
                    is_last = step == num_steps
                    delivered = [row for row in rows if is_last or step in row.partial_steps]
                    if not delivered:
                        continue
                    batch = await self.work_queue.run(
                        functools.partial(self.pipeline.postprocess, noisy if is_last else clean)
                    )
                    for row, pixels in zip(rows, batch, strict=False):  # without the padding
                        if row in delivered:
                            row.outputs.put_nowait(
                                ImageOutput(row.index, row.partial_steps.get(step), pixels)
                            )
            self._batch_seconds = time.monotonic() - started
        except Exception as error:
            for row in rows:
                row.outputs.put_nowait(error)


def denoise_batch(
    pipeline: DiffusionPipeline,
    rows: Sequence[tuple[ImageRequest, int, int]],
    size: int | None = None,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield the images of a batch after each denoising step, which is computed on demand.

    Args:
        pipeline: the model.
        rows: requests with equal plan and strength, each with its seed and the index of its image.
        size: the batch size B, one of `BATCH_SIZES`; None for the smallest that holds the rows.

    Yields:
        The noisy images and the estimated denoised images, each float32 [B, Y, X, 3].
    """
    size = size or padded_batch_size(len(rows))
    padded = [*rows, *[rows[-1]] * (size - len(rows))]
    prompts = [request.prompt for request, _, _ in padded]
    # As `sample.image_keys`, whose key i does not depend on the number of images.
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), index) for _, seed, index in padded])
    plan = rows[0][0].plan
    init_images = [request.init_image for request, _, _ in padded if request.init_image]
    if not init_images:
        steps = pipeline.steps(prompts, keys, plan)
    else:
        masks = [image.mask for image in init_images if image.mask is not None]
        steps = edit.steps(
            pipeline,
            prompts,
            keys,
            plan,
            images=np.stack([image.image for image in init_images]),
            masks=np.stack(masks) if masks else None,
            strength=init_images[0].strength,
        )
    for step in steps:
        yield jax.block_until_ready(step)


def padded_batch_size(rows: int) -> int:
    """Return the smallest batch size that holds `rows` images."""
    return next(size for size in BATCH_SIZES if size >= rows)


def load_image_model(
    id: str,
    path: Path,
    encoder: Path,
    *,
    owned_by: str,
    notify: Callable[[str], None] = lambda line: None,
) -> ImageModel:
    """Load an image model, and compile its programs for one image.

    Args:
        id: the id to serve it under.
        path: a folder with the subfolders `denoiser` and `upscaler`.
        encoder: the folder of the text encoder that the denoiser was trained with.
        owned_by: the publisher.
        notify: called with a message for each slow operation.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or the encoder's width is wrong.
    """
    enable_compilation_cache()
    pipeline = diffusion.load(path, encoder)
    parts = [path / "denoiser", path / "upscaler", encoder]
    arrays = jax.tree.leaves((pipeline.denoiser, pipeline.upscaler))
    model = ImageModel(
        id=id,
        created=int((path / "denoiser" / "config.json").stat().st_mtime),
        owned_by=owned_by,
        pipeline=pipeline,
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
    """Return the spec of an image model; see `Kind.describe`."""
    assert files.encoder is not None
    encoder = files.encoder
    parts = [files.path / "denoiser", files.path / "upscaler", encoder]
    weights = [part / "model.safetensors" for part in parts]
    for part in parts:
        read_json_object(part / "config.json")  # raises before the server starts

    def load() -> ImageModel:
        return load_image_model(
            files.id, files.path, encoder, owned_by=files.publisher, notify=options.notify
        )

    return ModelSpec(
        id=files.id,
        created=int((parts[0] / "config.json").stat().st_mtime),
        owned_by=files.publisher,
        memory=lambda: 2 * sum(path.stat().st_size for path in weights),  # stored in float16
        load=load,
        stamp=functools.partial(stamp_of, *parts),
        kind="images",
        context=(files.entry.context or None) if files.entry else None,
    )


def _recognizes(path: Path) -> bool:
    """Whether a folder has the layout of the models of `diffusion`."""
    return all((path / name / "config.json").is_file() for name in ("denoiser", "upscaler"))


KIND = Kind(
    name="images",
    task="generate images",
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
