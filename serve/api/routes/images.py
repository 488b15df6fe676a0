"""POST /v1/images/generations, edits and variations: pictures from prompts and from pictures.

The model draws small squares (`emoji-64`: 64 x 64 pixels), and ``auto`` is that size. Any other is
the same picture enlarged: nothing here is drawn at 1024 x 1024. Answers hold URLs, as those of
dall-e-2 did, or base64, which code written for gpt-image-* expects without asking. ``quality`` sets
the number of denoising steps. ``seed`` is an extension: the same request gets the same bytes again.

``stream`` sends ``partial_images`` pictures on the way, what the network saw behind the noise after
some of the steps, and each finished one; ``index``, another extension, says which of ``n`` it is.

An edit changes what is transparent in the mask, or in the picture where there is no mask, and
nothing else: the other pixels come back as they were, at the size of the upload. An opaque picture
without a mask is an error, as with dall-e-2; under a name of gpt-image-* all of it is redrawn, from
the picture and the prompt. A variation may be steered by a ``prompt`` and a ``strength`` from 0.01
to 1, which OpenAI has not.

``output_compression`` is the quality of JPEG and WebP, 0 to 100, 95 by default; PNG has none.

Nothing holds the event loop for long: pictures are decoded, drawn into and encoded on two threads,
base64 is made and read in pieces, and answers in base64 are sent a picture at a time.

Prompts are read to their 16th token. `image_uploads.py` reads the pictures that requests bring.
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

BODY_LIMITS = {  # what a body may take: a picture, its mask, and the form around them
    f"/v1/images/{route}": 2 * MAX_BYTES for route in ("edits", "variations")
}
MIN_SIDE, MAX_SIDE = 16, 1024  # pixels of a side
STEPS = {"low": 10, "medium": 20, "high": 40}
_QUALITY_ALIASES = {"standard": "medium", "auto": "medium", "hd": "high"}

# For work on whole pictures: a large one takes 200 MB meanwhile, so at most two are worked on.
_workers = ThreadPoolExecutor(2, thread_name_prefix="pictures")

T = TypeVar("T")


@router.post("/v1/images/generations", **route_docs(Images, ImageGenerationBody, events=ImageEvent))
async def create_image(request: Request) -> Response:
    """Draw what a prompt says."""
    body = await read_json(request, ImageGenerationBody)
    model = await _model(request, body.model)
    side = _side(body, model.pipeline.size)

    def whole(drawn: np.ndarray) -> np.ndarray:
        return _resize(drawn, side)

    return await _answer(request, _Task(model, body, body.prompt, whole, "image_generation"))


@router.post(
    "/v1/images/edits", **route_docs(Images, ImageEditBody, form=ImageEditForm, events=ImageEvent)
)
async def create_image_edit(request: Request) -> Response:
    """Change a part of a picture (a form: `image`, `mask`, `prompt`; or JSON)."""
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
            f"Uploaded image must be square to come back as {body.size}: it has {width} x {height} "
            "pixels. Leave 'size' out to get it back at its own.",
            param="image",
            code="invalid_image",
        )

    def whole(drawn: np.ndarray) -> np.ndarray:
        hole = np.ones((height, width, 1)) if mask is None else mask / np.float32(255)
        changed = edit.paste(original, drawn, hole)
        return changed if side is None else _resize(changed, side)

    def read() -> InitImage:
        fitted = edit.preprocess_image(original, size)
        if mask is None:
            return InitImage(fitted, strength=edit.VARIATION_STRENGTH)
        return InitImage(fitted, edit.preprocess_mask(mask, size))

    files.clear()  # many requests may wait, each with megabytes of them
    source = await _run_in_worker(read)
    background = "opaque"
    if original.shape[2] == 4 and body.output_format != "jpeg":
        background = "transparent"  # where the original is, outside the mask
    task = _Task(model, body, body.prompt, whole, "image_edit", source, background)
    return await _answer(request, task)


@router.post(
    "/v1/images/variations", **route_docs(Images, form=ImageVariationForm, events=ImageEvent)
)
async def create_image_variation(request: Request) -> Response:
    """Draw a picture again, a little differently (a form: `image`)."""
    body, files = await read_image_form(request, ImageVariationForm)
    model = await _model(request, body.model)
    side = _side(body, model.pipeline.size)

    def read() -> InitImage:
        fitted = edit.preprocess_image(decode_image(files, "image"), model.pipeline.cfg.image_size)
        return InitImage(fitted, strength=body.strength)

    def whole(drawn: np.ndarray) -> np.ndarray:
        return _resize(drawn, side)

    source = await _run_in_worker(read)
    files.clear()  # as above
    return await _answer(request, _Task(model, body, body.prompt, whole, "image_edit", source))


@router.get("/images/{name}", **route_docs(media_type="image/png"))
@router.head("/images/{name}", include_in_schema=False)
async def get_image(request: Request, name: str) -> Response:
    """Download a picture; its URL is in an answer, and good for an hour."""
    found = _temp_files(request).find(name)
    if found is None:
        raise APIError(
            404,
            f"No such image: {name[:80]}. Images can be fetched for {LIFETIME_SECONDS // 60} minutes.",
            param="name",
            code="not_found",
        )
    path, left = found
    return FileResponse(
        path,
        media_type=f"image/{path.suffix[1:]}",
        filename=name,  # as an attachment, which a page can still show
        headers={
            "x-content-type-options": "nosniff",
            "content-security-policy": "sandbox",
            "cache-control": f"private, max-age={left}",
        },
    )


# --- options ----------------------------------------------------------------------------------


async def _model(request: Request, name: str | None) -> ImageModel:
    """The model called ``name``, or the first that draws."""
    if name is None:
        drawing = (
            spec.id for spec in state_of(request).registry.list_models() if spec.kind == "images"
        )
        name = next(drawing, "dall-e-2")  # of which the error says what it is and where to get it
    return await get_loaded_model(request, name, ImageModel)


def _side(body: ImageOptions, own: int) -> int:
    """Pixels of a side of what is asked for; `own` are those of what the model draws."""
    if body.size == "auto":
        return own
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", body.size)
    if match is None or match[1] != match[2] or not MIN_SIDE <= int(match[1]) <= MAX_SIDE:
        raise APIError(
            400,
            f"Invalid value: '{body.size[:80]}'. Supported values are: 'auto', '{own}x{own}', "
            "which is what the model draws, and, enlarged, '256x256', '512x512', '1024x1024' or "
            f"any square from '{MIN_SIDE}x{MIN_SIDE}' to '{MAX_SIDE}x{MAX_SIDE}'.",
            param="size",
            code="invalid_value",
        )
    return int(match[1])


def _is_gpt_image(body: ImageOptions) -> bool:
    """Whether the request was written for one of OpenAI's newer models."""
    return "gpt-image" in (body.model or "")


# --- drawing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What is to be drawn, and what becomes of it.

    Attributes:
        whole: makes what the client gets of what the model has drawn.
        event: how the events of its stream begin.
        background: what the answer says of it.
    """

    model: ImageModel
    body: ImageOptions
    prompt: str
    postprocess: Callable[[np.ndarray], np.ndarray]
    event_prefix: str
    source: InitImage | None = None
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
            init_image=self.source,
            client=client,
        )

    def encode(self, pixels: np.ndarray) -> bytes:
        """The file of what the client gets."""
        quality = self.body.output_compression
        return image_io.encode(pixels, self.body.output_format, 95 if quality is None else quality)

    def base64(self, pixels: np.ndarray) -> list[bytes]:
        """The file of what the client gets of what was drawn, in pieces of base64."""
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
    """Refuse what no picture of ours can have."""
    if body.background == "transparent":
        raise unsupported("background", "transparent", "Its pictures are opaque: use 'opaque'.")
    if body.output_format == "png" and body.output_compression not in (None, 100):
        raise APIError(
            400,
            "Compression less than 100 is not supported for PNG output format: choose 'jpeg' or "
            "'webp' as 'output_format'.",
            param="output_compression",
            code="invalid_value",
        )


async def _answer(request: Request, task: _Task) -> Response:
    body, call = task.body, context_of(request.scope)
    _check(body)
    call.model, call.prompt_tokens = task.model.id, task.tokens
    if body.stream:
        return await event_stream(request, _events(task, call), named=True)
    passing = _temp_files(request)
    as_base64 = body.response_format == "b64_json" or (
        body.response_format is None and _is_gpt_image(body)
    )
    base, loop = str(request.base_url), asyncio.get_running_loop()

    def written(pixels: np.ndarray) -> dict[str, str]:
        data = task.encode(task.postprocess(pixels))
        name = passing.put(data, body.output_format)
        # Each by itself: to look at every file there is once a request would be ever more work.
        loop.call_soon_threadsafe(loop.call_later, LIFETIME_SECONDS + 1, passing.drop, name)
        return {"url": f"{base}images/{name}"}

    async def draw() -> tuple[list[np.ndarray], Any]:
        found = {drawn.index: drawn.pixels async for drawn in _generate(task, call)}
        drawn = [found[index] for index in sorted(found)]
        if as_base64:
            return drawn, await _run_in_worker(task.base64, drawn[0])
        return drawn, [await _run_in_worker(written, pixels) for pixels in drawn]

    drawn, found = await cancel_on_disconnect(request.receive, draw())
    answer = {
        "created": int(time.time()),
        "data": [{"b64_json": ""}] * len(drawn) if as_base64 else found,
        "background": task.background,
        "output_format": body.output_format,
        "quality": task.quality,
        "usage": task.usage(),
    }
    if not as_base64:
        return JSONResponse(answer)

    async def pieces() -> AsyncGenerator[bytes, None]:
        """The answer with one picture in memory at a time, the first of which is there."""
        for number, between in enumerate(split_at_base64(answer)):
            if number:
                encoded = (
                    found if number == 1 else await _run_in_worker(task.base64, drawn[number - 1])
                )
                for piece in encoded:
                    yield piece
            yield between

    return StreamingResponse(pieces(), media_type="application/json")


async def _events(task: _Task, call: RequestContext) -> AsyncGenerator[Event, None]:
    def written(pixels: np.ndarray) -> dict[str, Any]:
        whole = task.postprocess(pixels)
        height, width = whole.shape[:2]
        return {"b64_json": to_base64(task.encode(whole)), "size": f"{width}x{height}"}

    async with aclosing(_generate(task, call)) as pictures:
        async for drawn in pictures:
            event: Event = {
                "type": f"{task.event_prefix}.{'completed' if drawn.partial_index is None else 'partial_image'}",
                **await _run_in_worker(written, drawn.pixels),
                "created_at": int(time.time()),
                "quality": task.quality,
                "background": task.background,
                "output_format": task.body.output_format,
                "index": drawn.index,
            }
            if drawn.partial_index is None:
                yield event | {"usage": task.usage()}
            else:
                yield event | {"partial_image_index": drawn.partial_index}


async def _generate(task: _Task, call: RequestContext) -> AsyncGenerator[ImageOutput, None]:
    """The pictures as they come, within the time that an answer may take."""
    pictures = task.model.generate(task.image_request(call.client))
    end = None if call.timeout is None else asyncio.get_running_loop().time() + call.timeout
    try:
        while True:
            try:
                async with asyncio.timeout_at(end):
                    drawn = await anext(pictures, None)
            except TimeoutError:
                raise APIError(
                    504,
                    f"The pictures took longer than the {call.timeout:g} seconds this server "
                    "allows. Ask for fewer.",
                    type="server_error",
                    code="timeout",
                    headers={"x-should-retry": "false"},  # it would take as long again
                ) from None
            if drawn is None:
                return
            yield drawn
    finally:
        await pictures.aclose()


async def _run_in_worker(work: Callable[..., T], *arguments: Any) -> T:
    """Has work on whole pictures done where it holds nobody up."""
    return await asyncio.get_running_loop().run_in_executor(_workers, work, *arguments)


def _resize(pixels: np.ndarray, side: int) -> np.ndarray:
    return pixels if len(pixels) == side else upscale.resize(pixels, side)


def _temp_files(request: Request) -> TempFiles:
    return state_of(request).temp_files
