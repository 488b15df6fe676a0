"""Request bodies of the image routes, JSON and forms, as pydantic models."""

from typing import Annotated, Literal

from pydantic import Field

from diffusion import edit, image_io
from serve.api.multipart import File
from serve.api.requests import Body
from serve.api.unused_fields import UNUSED

ImagePrompt = Annotated[str, Field(min_length=1, max_length=32_000)]


class ImageOptions(Body):
    """The fields that all image routes share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    size: str = "auto"
    response_format: Literal["url", "b64_json"] | None = None
    output_format: image_io.ImageFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["transparent", "opaque", "auto"] = "auto"
    quality: Literal["standard", "hd", "low", "medium", "high", "auto"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    style: Annotated[Literal["vivid", "natural"] | None, UNUSED] = None
    moderation: Annotated[Literal["low", "auto"], UNUSED] = "auto"
    complexity: Annotated[Literal["low", "medium", "high"] | None, UNUSED] = None
    input_fidelity: Annotated[Literal["high", "low"] | None, UNUSED] = None
    user: Annotated[str | None, UNUSED] = None
    safety_identifier: Annotated[str | None, Field(max_length=64), UNUSED] = None


class ImageGenerationBody(ImageOptions):
    """Body of POST /v1/images/generations."""

    prompt: ImagePrompt


class ImageReference(Body):
    """An image in a JSON body: either a `data:` URL or the id of an uploaded file."""

    image_url: str | None = None
    file_id: str | None = None


class ImageEditBody(ImageOptions):
    """JSON body of POST /v1/images/edits."""

    prompt: ImagePrompt
    images: Annotated[list[ImageReference], Field(min_length=1, max_length=16)]
    mask: ImageReference | None = None


class ImageEditForm(ImageOptions):
    """Form of POST /v1/images/edits; the field `image` may be named `image[]`."""

    prompt: ImagePrompt
    image: File
    mask: File | None = None


class ImageVariationForm(ImageOptions):
    """Form of POST /v1/images/variations."""

    image: File
    prompt: Annotated[str, Field(max_length=32_000)] = ""
    strength: Annotated[float, Field(ge=0.01, le=1)] = edit.VARIATION_STRENGTH
