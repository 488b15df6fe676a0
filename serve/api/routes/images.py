"""POST /v1/images/generations, edits and variations: images from prompts and from images.

The model generates small squares (`emoji-64`: 64 x 64 pixels), and size ``auto`` is that size. For
any other size the image is resized. Responses contain URLs, as for dall-e-2, or base64, the default
for the model names gpt-image-*. ``quality`` sets the number of denoising steps. ``seed`` is an
extension: the same request with the same seed gives the same bytes.

``stream`` sends ``partial_images`` intermediate images (the network's estimates of the clean image
after some of the steps) and each finished image. ``index``, another extension, numbers the ``n``
images.

An edit changes the pixels that are transparent in the mask, or in the image if there is no mask.
Other pixels do not change, and the result has the size of the upload. An opaque image without a
mask returns 400, as with dall-e-2; with a model name gpt-image-* the whole image is redrawn,
starting from the image and the prompt. As extensions, a variation takes a ``prompt`` and a
``strength`` from 0.01 to 1.

``output_compression`` is the quality of JPEG and WebP, 0 to 100, 95 by default; PNG is lossless.

To keep the event loop responsive, images are decoded, composited and encoded on two threads, base64
is processed in chunks, and base64 responses are sent one image at a time.

Prompts are truncated to 16 tokens. `image_uploads.py` reads the images in requests.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from diffusion import SamplerOptions, edit, image_io, upscale
from serve.api.base64_chunks import to_base64
from serve.api.errors import APIError, unsupported
from serve.api.image_requests import (
    ImageEditBody,
    ImageEditForm,
    ImageGenerationBody,
    ImageOptions,
    ImageVariationForm,
)
from serve.api.image_uploads import (
    MAX_BYTES,
    decode_image,
    read_edit,
    read_image_form,
    referenced_files,
)
from serve.api.openapi import route_docs
from serve.api.request_context import RequestContext, context_of
from serve.api.requests import read_json
from serve.api.responses import ImageEvent, Images
from serve.api.sse import Event, cancel_on_disconnect, event_stream, split_at_base64
from serve.api.state import get_loaded_model, state_of
from serve.api.temp_files import LIFETIME_SECONDS, TempFiles
from serve.models.images import ImageModel, ImageOutput, ImageRequest, InitImage

router = APIRouter()

BODY_LIMITS = {  # bytes of a body by path: an image, its mask, and the rest of the form
    f"/v1/images/{route}": 2 * MAX_BYTES for route in ("edits", "variations")
}
MIN_SIDE, MAX_SIDE = 16, 1024  # width and height of a requested image, in pixels
STEPS = {"low": 10, "medium": 20, "high": 40}
_QUALITY_ALIASES = {"standard": "medium", "auto": "medium", "hd": "high"}

# Processing a large image takes 200 MB, so at most two are processed at a time.
_workers = ThreadPoolExecutor(2, thread_name_prefix="images")

T = TypeVar("T")


@router.post("/v1/images/generations", **route_docs(Images, ImageGenerationBody, events=ImageEvent))
async def create_image(request: Request) -> Response:
    """Generate images from a prompt."""
    body = await read_json(request, ImageGenerationBody)
    model = await _model(request, body.model)
    side = _side(body, model.pipeline.size)

    def postprocess(pixels: np.ndarray) -> np.ndarray:
        return _resize(pixels, side)

    return await _respond(request, _Task(model, body, body.prompt, postprocess, "image_generation"))


@router.post(
    "/v1/images/edits", **route_docs(Images, ImageEditBody, form=ImageEditForm, events=ImageEvent)
)
async def create_image_edit(request: Request) -> Response:
    """Change a part of an image (a form: `image`, `mask`, `prompt`; or JSON)."""
    if request.headers.get("content-type", "").lower().startswith("application/json"):
        body = await read_json(request, ImageEditBody)
        files = await _run_in_worker(referenced_files, request, body)
    else:
        body, files = await read_image_form(request, ImageEditForm)
    model = await _model(request, body.model)
    size = model.pipeline.cfg.image_size
    original, mask = await _run_in_worker(read_edit, files, _is_gpt_image(body))
    height, width = original.shape[:2]
    side = None if body.size == "auto" else _side(body, model.pipeline.size)
    if side is not None and height != width:
        raise APIError(
            400,
            f"Uploaded image must be square for size {body.size}: it has {width} x {height} "
            "pixels. Leave out 'size' to keep the size of the upload.",
            param="image",
            code="invalid_image",
        )

    def postprocess(pixels: np.ndarray) -> np.ndarray:
        weights = np.ones((height, width, 1)) if mask is None else mask / np.float32(255)
        edited = edit.paste(original, pixels, weights)
        return edited if side is None else _resize(edited, side)

    def preprocess() -> InitImage:
        image = edit.preprocess_image(original, size)
        if mask is None:
            return InitImage(image, strength=edit.VARIATION_STRENGTH)
        return InitImage(image, edit.preprocess_mask(mask, size))

    files.clear()  # free the uploads while the request waits for the model
    init_image = await _run_in_worker(preprocess)
    background = "opaque"
    if original.shape[2] == 4 and body.output_format != "jpeg":
        background = "transparent"  # the original has transparent pixels outside the mask
    task = _Task(model, body, body.prompt, postprocess, "image_edit", init_image, background)
    return await _respond(request, task)


@router.post(
    "/v1/images/variations", **route_docs(Images, form=ImageVariationForm, events=ImageEvent)
)
async def create_image_variation(request: Request) -> Response:
    """Generate a variation of an image (a form: `image`)."""
    body, files = await read_image_form(request, ImageVariationForm)
    model = await _model(request, body.model)
    side = _side(body, model.pipeline.size)

    def preprocess() -> InitImage:
        image = edit.preprocess_image(decode_image(files, "image"), model.pipeline.cfg.image_size)
        return InitImage(image, strength=body.strength)

    def postprocess(pixels: np.ndarray) -> np.ndarray:
        return _resize(pixels, side)

    init_image = await _run_in_worker(preprocess)
    files.clear()  # as in `create_image_edit`
    task = _Task(model, body, body.prompt, postprocess, "image_edit", init_image)
    return await _respond(request, task)


@router.get("/images/{name}", **route_docs(media_type="image/png"))
@router.head("/images/{name}", include_in_schema=False)
async def get_image(request: Request, name: str) -> Response:
    """Download a generated image by the URL in a response, which is valid for an hour."""
    entry = _temp_files(request).find(name)
    if entry is None:
        raise APIError(
            404,
            f"No such image: {name[:80]}. Images expire after {LIFETIME_SECONDS // 60} minutes; "
            "generate it again.",
            param="name",
            code="not_found",
        )
    path, seconds_left = entry
    return FileResponse(
        path,
        media_type=f"image/{path.suffix[1:]}",
        filename=name,  # served as an attachment, which an <img> of a page can still show
        headers={
            "x-content-type-options": "nosniff",
            "content-security-policy": "sandbox",
            "cache-control": f"private, max-age={seconds_left}",
        },
    )


# --- options ----------------------------------------------------------------------------------


async def _model(request: Request, name: str | None) -> ImageModel:
    """Return the model called ``name``, or the first served image model if it is None."""
    if name is None:
        image_models = (
            spec.id for spec in state_of(request).registry.list_models() if spec.kind == "images"
        )
        name = next(image_models, "dall-e-2")  # if unknown, the error says which model to pull
    return await get_loaded_model(request, name, ImageModel)


def _side(body: ImageOptions, model_side: int) -> int:
    """Return the side of the requested square in pixels: `model_side` for the size "auto"."""
    if body.size == "auto":
        return model_side
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", body.size)
    if match is None or match[1] != match[2] or not MIN_SIDE <= int(match[1]) <= MAX_SIDE:
        raise APIError(
            400,
            f"Invalid value: '{body.size[:80]}'. Supported values are: 'auto', "
            f"'{model_side}x{model_side}' (the model's size), and, resized, '256x256', '512x512', "
            f"'1024x1024' or any square from '{MIN_SIDE}x{MIN_SIDE}' to '{MAX_SIDE}x{MAX_SIDE}'.",
            param="size",
            code="invalid_value",
        )
    return int(match[1])


def _is_gpt_image(body: ImageOptions) -> bool:
    """Return whether the request names one of OpenAI's gpt-image models."""
    return "gpt-image" in (body.model or "")


# --- generation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """An image request, and the conversion of the model's output to image files.

    Attributes:
        postprocess: Converts the model's pixels to those of the response.
        event_prefix: Prefix of the types of streamed events.
        background: Value of `background` in the response.
    """

    model: ImageModel
    body: ImageOptions
    prompt: str
    postprocess: Callable[[np.ndarray], np.ndarray]
    event_prefix: str
    init_image: InitImage | None = None
    background: str = "opaque"

    @property
    def quality(self) -> str:
        return _QUALITY_ALIASES.get(self.body.quality, self.body.quality)

    def image_request(self, client: str) -> ImageRequest:
        body = self.body
        return ImageRequest(
            prompt=self.prompt,
            num_images=body.n,
            seed=body.seed,
            plan=SamplerOptions(steps=STEPS[self.quality]),
            num_partial_images=body.partial_images if body.stream else 0,
            init_image=self.init_image,
            client=client,
        )

    def encode(self, pixels: np.ndarray) -> bytes:
        """Encode pixels in the requested file format."""
        quality = self.body.output_compression
        return image_io.encode(pixels, self.body.output_format, 95 if quality is None else quality)

    def base64(self, pixels: np.ndarray) -> list[bytes]:
        """Postprocess and encode the model's pixels; return the file as chunks of base64."""
        return to_base64(self.encode(self.postprocess(pixels)))

    @cached_property
    def tokens(self) -> int:
        return self.model.count_tokens(self.prompt)

    def usage(self) -> dict[str, Any]:
        count = self.tokens
        return {
            "input_tokens": count,
            "input_tokens_details": {"text_tokens": count, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": count,
        }


def _check(body: ImageOptions) -> None:
    """Raise an APIError for options that the image models do not support."""
    if body.background == "transparent":
        raise unsupported(
            "background",
            "transparent",
            "The image models generate only opaque images: use 'opaque'.",
        )
    if body.output_format == "png" and body.output_compression not in (None, 100):
        raise APIError(
            400,
            "Compression less than 100 is not supported for PNG output format: choose 'jpeg' or "
            "'webp' as 'output_format'.",
            param="output_compression",
            code="invalid_value",
        )


async def _respond(request: Request, task: _Task) -> Response:
    body, context = task.body, context_of(request.scope)
    _check(body)
    context.model, context.prompt_tokens = task.model.id, task.tokens
    if body.stream:
        return await event_stream(request, _events(task, context), named=True)
    temp_files = _temp_files(request)
    as_base64 = body.response_format == "b64_json" or (
        body.response_format is None and _is_gpt_image(body)
    )
    base, loop = str(request.base_url), asyncio.get_running_loop()

    def store_image(pixels: np.ndarray) -> dict[str, str]:
        data = task.encode(task.postprocess(pixels))
        name = temp_files.put(data, body.output_format)
        # One timer per file, because the time to scan the folder would grow with the files in it.
        loop.call_soon_threadsafe(loop.call_later, LIFETIME_SECONDS + 1, temp_files.drop, name)
        return {"url": f"{base}images/{name}"}

    async def generate() -> tuple[list[np.ndarray], Any]:
        by_index = {output.index: output.pixels async for output in _generate(task, context)}
        images = [by_index[index] for index in sorted(by_index)]
        if as_base64:
            return images, await _run_in_worker(task.base64, images[0])
        return images, [await _run_in_worker(store_image, pixels) for pixels in images]

    # `encoded` is the base64 of the first image, or the URLs of all.
    images, encoded = await cancel_on_disconnect(request.receive, generate())
    response = {
        "created": int(time.time()),
        "data": [{"b64_json": ""}] * len(images) if as_base64 else encoded,
        "background": task.background,
        "output_format": body.output_format,
        "quality": task.quality,
        "usage": task.usage(),
    }
    if not as_base64:
        return JSONResponse(response)

    async def chunks() -> AsyncGenerator[bytes, None]:
        """Yield the parts of the response; only one image at a time is in memory as base64."""
        for number, part in enumerate(split_at_base64(response)):
            if number == 1:
                for chunk in encoded:
                    yield chunk
            elif number:
                for chunk in await _run_in_worker(task.base64, images[number - 1]):
                    yield chunk
            yield part

    return StreamingResponse(chunks(), media_type="application/json")


async def _events(task: _Task, context: RequestContext) -> AsyncGenerator[Event, None]:
    def encode(pixels: np.ndarray) -> dict[str, Any]:
        image = task.postprocess(pixels)
        height, width = image.shape[:2]
        return {"b64_json": to_base64(task.encode(image)), "size": f"{width}x{height}"}

    async with aclosing(_generate(task, context)) as outputs:
        async for output in outputs:
            is_final = output.partial_index is None
            event: Event = {
                "type": f"{task.event_prefix}.{'completed' if is_final else 'partial_image'}",
                **await _run_in_worker(encode, output.pixels),
                "created_at": int(time.time()),
                "quality": task.quality,
                "background": task.background,
                "output_format": task.body.output_format,
                "index": output.index,
            }
            if is_final:
                yield event | {"usage": task.usage()}
            else:
                yield event | {"partial_image_index": output.partial_index}


async def _generate(task: _Task, context: RequestContext) -> AsyncGenerator[ImageOutput, None]:
    """Yield images as they are generated, until the request's timeout."""
    outputs = task.model.generate(task.image_request(context.client))
    loop, timeout = asyncio.get_running_loop(), context.timeout
    deadline = None if timeout is None else loop.time() + timeout
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    output = await anext(outputs, None)
            except TimeoutError:
                raise APIError(
                    504,
                    f"The request exceeded the server's timeout of {timeout:g} seconds. Request "
                    "fewer images.",
                    type="server_error",
                    code="timeout",
                    headers={"x-should-retry": "false"},  # a retry would take as long
                ) from None
            if output is None:
                return
            yield output
    finally:
        await outputs.aclose()


async def _run_in_worker(work: Callable[..., T], *arguments: Any) -> T:
    """Run a function on a worker thread for image processing, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(_workers, work, *arguments)


def _resize(pixels: np.ndarray, side: int) -> np.ndarray:
    return pixels if len(pixels) == side else upscale.resize(pixels, side)


def _temp_files(request: Request) -> TempFiles:
    return state_of(request).temp_files
