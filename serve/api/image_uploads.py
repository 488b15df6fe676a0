"""Pictures that come with a request: from forms, `data:` URLs and uploaded files, as pixels.

An upload's bytes say what it is, and no other URL is fetched. What is transparent in the mask, or
in the picture where there is no mask, is what an edit changes.
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

MAX_BYTES = 20 * 2**20  # of a picture
MAX_PIXELS = 2048 * 2048

AnyForm = TypeVar("AnyForm", bound=ImageOptions)
ImageFiles = dict[str, bytes]  # "image" and "mask"


async def read_image_form(request: Request, kind: type[AnyForm]) -> tuple[AnyForm, ImageFiles]:
    """The fields of a form, and its files."""
    with temporary_file() as image, temporary_file() as mask:
        sinks = {"image": image, "mask": mask}
        form = await read_form(request, kind, sinks)
        sent = [name for name in sinks if getattr(form, name, None) is not None]
        return form, {name: await read_all(sinks[name]) for name in sent}


def referenced_files(request: Request, body: ImageEditBody) -> ImageFiles:
    """The files that a JSON body names."""
    if len(body.images) > 1:
        raise _several("images")
    found = {"image": _referenced_file(request, body.images[0], "images[0]")}
    if body.mask is not None:
        found["mask"] = _referenced_file(request, body.mask, "mask")
    return found


def _referenced_file(request: Request, reference: ImageReference, path: str) -> bytes:
    if (reference.image_url is None) == (reference.file_id is None):
        raise _bad(path, f"Invalid '{path}': give one of 'image_url' and 'file_id'.")
    if reference.file_id is not None:
        store = store_of(request)
        file = find_file(store, reference.file_id, f"{path}.file_id")
        _refuse_large(file["bytes"], path)
        return store.blob_path(reference.file_id).read_bytes()
    head, comma, data = (reference.image_url or "").partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise _bad(
            f"{path}.image_url",
            f"Invalid '{path}.image_url': expected data:image/png;base64,..., because this server "
            "fetches no URLs. Or upload the picture to /v1/files and give its 'file_id'.",
        )
    try:
        return from_base64(data)
    except ValueError as error:  # binascii's, or the one for what is not ASCII
        raise _bad(
            f"{path}.image_url", f"Invalid '{path}.image_url': not base64 ({error})."
        ) from None


def read_edit(files: ImageFiles, may_be_opaque: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Read what is to be changed, and where.

    Args:
        may_be_opaque: whether all of an opaque picture changes where there is no mask.

    Returns:
        The picture, uint8 [Y, X, 3 or 4], and the mask, uint8 [Y, X, 1]: 255 where the picture
        changes, 0 where it is kept, in between at soft edges; None for all of an opaque picture.
    """
    image = decode_image(files, "image")
    if "mask" not in files:
        mask = _edit_mask(image)
        if not mask.any():
            if may_be_opaque:
                return image[..., :3], None
            raise _bad(
                "image",
                "Invalid 'image': it has no transparent pixels, and there is no mask. What is "
                "transparent in either is what changes. Under the name gpt-image-1 all of it is "
                "redrawn.",
            )
        return image[..., :3], mask
    other = decode_image(files, "mask")
    (height, width), (y, x) = image.shape[:2], other.shape[:2]
    if (height, width) != (y, x):
        raise _bad(
            "mask",
            f"Invalid 'mask': it has {x} x {y} pixels, and the image {width} x {height}. They must "
            "be of the same size.",
        )
    mask = _edit_mask(other)
    if not mask.any():
        raise _bad(
            "mask",
            "Invalid 'mask': it has no transparent pixels, so nothing would change. Transparent "
            "pixels are those that do, not white ones.",
        )
    return (image if _edit_mask(image).any() else image[..., :3]), mask


def _edit_mask(pixels: np.ndarray) -> np.ndarray:
    """How transparent a picture is: uint8 [Y, X, 4] -> [Y, X, 1]."""
    return 255 - pixels[..., 3:]


def decode_image(files: ImageFiles, param: str) -> np.ndarray:
    """A picture that was uploaded: uint8 [Y, X, 4]."""
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
            f"Invalid '{param}': it has {size} bytes, and at most {MAX_BYTES} are read.",
            "image_too_large",
        )


def _several(param: str) -> APIError:
    return unsupported(param, "several pictures", "One picture can be edited at a time.")


def _bad(param: str, message: str, code: str = "invalid_image") -> APIError:
    return APIError(400, message, param=param, code=code)
