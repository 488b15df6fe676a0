"""Images in requests: from forms, `data:` URLs and uploaded files, decoded to pixels.

The format of an image is detected from its bytes. URLs with other schemes are refused, not fetched.
An edit changes the pixels that are transparent in the mask, or in the image if there is no mask.
"""

from typing import TypeVar

import numpy as np
from starlette.requests import Request

from diffusion import image_io
from serve.api.base64_chunks import from_base64
from serve.api.errors import APIError, unsupported
from serve.api.image_requests import ImageEditBody, ImageOptions, ImageReference
from serve.api.multipart import read_all, read_form, temporary_file
from serve.api.stored_files import find_file, store_of

MAX_BYTES = 20 * 2**20  # of an encoded image
MAX_PIXELS = 2048 * 2048

AnyForm = TypeVar("AnyForm", bound=ImageOptions)
ImageFiles = dict[str, bytes]  # "image" and "mask"


async def read_image_form(request: Request, model: type[AnyForm]) -> tuple[AnyForm, ImageFiles]:
    """Return the fields of a form as ``model``, and its image files."""
    with temporary_file() as image, temporary_file() as mask:
        sinks = {"image": image, "mask": mask}
        form = await read_form(request, model, sinks)
        names = [name for name in sinks if getattr(form, name, None) is not None]
        return form, {name: await read_all(sinks[name]) for name in names}


def referenced_files(request: Request, body: ImageEditBody) -> ImageFiles:
    """Return the image files that a JSON body refers to by `data:` URL or file id.

    Raises:
        APIError: 400 for more than one image or an invalid reference, 404 for an unknown file.
    """
    if len(body.images) > 1:
        raise unsupported(
            "images", "several images", "Send one image: this server edits one image per request."
        )
    files = {"image": _referenced_file(request, body.images[0], "images[0]")}
    if body.mask is not None:
        files["mask"] = _referenced_file(request, body.mask, "mask")
    return files


def _referenced_file(request: Request, reference: ImageReference, path: str) -> bytes:
    if (reference.image_url is None) == (reference.file_id is None):
        raise _bad(path, f"Invalid '{path}': send either 'image_url' or 'file_id'.")
    if reference.file_id is not None:
        store = store_of(request)
        file = find_file(store, reference.file_id, f"{path}.file_id")
        _refuse_large(file["bytes"], path)
        return store.blob_path(reference.file_id).read_bytes()
    head, comma, data = (reference.image_url or "").partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise _bad(
            f"{path}.image_url",
            f"Invalid '{path}.image_url': expected a base64 data URL, such as "
            "'data:image/png;base64,...'. This server does not fetch images from the web. "
            "Alternatively, upload the image to /v1/files and send its 'file_id'.",
        )
    try:
        return from_base64(data)
    except ValueError as error:  # binascii.Error, or ValueError for text that is not ASCII
        raise _bad(
            f"{path}.image_url", f"Invalid '{path}.image_url': not base64 ({error})."
        ) from None


def read_edit(files: ImageFiles, may_be_opaque: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode the image and the mask of an edit.

    Args:
        files: The files "image" and, optionally, "mask".
        may_be_opaque: Whether an opaque image without a mask is edited as a whole.

    Returns:
        The image, uint8 [Y, X, 3 or 4], and the mask, uint8 [Y, X, 1]: 255 where the image changes,
        0 where it does not, in between at soft edges. The mask is None if the whole image changes.

    Raises:
        APIError: 400 for a file that cannot be decoded, sizes that differ, or a mask without
            transparent pixels.
    """
    image = decode_image(files, "image")
    if "mask" not in files:
        mask = _edit_mask(image)
        if not mask.any():
            if may_be_opaque:
                return image[..., :3], None
            raise _bad(
                "image",
                "Invalid 'image': it has no transparent pixels, and there is no mask. Send an "
                "image or a mask that is transparent where the image should change, or use the "
                "model name gpt-image-1 to redraw the whole image.",
            )
        return image[..., :3], mask
    mask_image = decode_image(files, "mask")
    height, width = image.shape[:2]
    mask_height, mask_width = mask_image.shape[:2]
    if (height, width) != (mask_height, mask_width):
        raise _bad(
            "mask",
            f"Invalid 'mask': it has {mask_width} x {mask_height} pixels, but the image has "
            f"{width} x {height}. Use the same size for both.",
        )
    mask = _edit_mask(mask_image)
    if not mask.any():
        raise _bad(
            "mask",
            "Invalid 'mask': it has no transparent pixels, so nothing would change. Send a mask "
            "that is transparent, not white, where the image should change.",
        )
    return (image if _edit_mask(image).any() else image[..., :3]), mask


def _edit_mask(pixels: np.ndarray) -> np.ndarray:
    """Return the mask 255 - alpha: 255 where an image is transparent, uint8 [Y, X, 1]."""
    return 255 - pixels[..., 3:]


def decode_image(files: ImageFiles, param: str) -> np.ndarray:
    """Decode an uploaded image to RGBA, uint8 [Y, X, 4].

    Args:
        files: The bytes of the uploaded files, by field name.
        param: The name of the field to decode.

    Raises:
        APIError: 400 for a file that is too large or cannot be decoded.
    """
    _refuse_large(len(files[param]), param)
    try:
        return image_io.decode(files[param], max_pixels=MAX_PIXELS)
    except ValueError as error:
        reason = str(error).rstrip(".") if files[param] else "the file is empty"
        raise _bad(param, f"Invalid '{param}': {reason}.") from None


def _refuse_large(size: int, param: str) -> None:
    if size > MAX_BYTES:
        raise _bad(
            param,
            f"Invalid '{param}': it has {size} bytes; the maximum is {MAX_BYTES}.",
            "image_too_large",
        )


def _bad(param: str, message: str, code: str = "invalid_image") -> APIError:
    return APIError(400, message, param=param, code=code)
