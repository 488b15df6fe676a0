"""`pellucid image`: generates images from prompts, and edits or varies images.

Each image is written to a file, whose path is printed to stdout. An existing file is overwritten
only if `--output` names it. The model generates small images (emoji-64: 64 x 64 pixels); `--size`
resizes them. A terminal with colour shows a preview after each denoising step.

The command and the server generate images with the same function and batch size
(`serve.models.images.denoise_batch`), so that the same prompt and seed give the same bytes in both,
and compiled programs are shared.
"""

import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.cli import console
from serve.cli.options import Json, model_option
from serve.exceptions import NotFound, WrongUsage

if TYPE_CHECKING:
    import numpy as np

    from diffusion import DiffusionPipeline
    from serve.cli.ansi_preview import AnsiPreview
    from serve.models.images import ImageRequest, InitImage
    from serve.models.spec import ModelFiles

DEFAULT_MODEL = "emoji-64"
STYLES = ("shaded", "flat", "3d")  # as in the captions of `diffusion.data`


def image(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help='Descriptions, such as "a happy cat".'),
    ] = None,
    model: Annotated[
        str,
        model_option("An image model of `pellucid models`, or NAME=PATH for a folder."),
    ] = DEFAULT_MODEL,
    count: Annotated[int, typer.Option("-n", min=1, max=100, help="Images per prompt.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same images."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=16, max=1024, help="Width and height in pixels. [default: 256; 128 in a grid]"
        ),
    ] = None,
    style: Annotated[str | None, typer.Option(help=f"One of {', '.join(STYLES)}.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. [default: 20]")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, ddim, ddpm, heun or dpmpp. [default: dpmpp]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale. [default: 3]")
    ] = None,
    edit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fill the transparent part of this image."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --edit: an image whose transparent part is to be filled."
        ),
    ] = None,
    vary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Generate variations of this image.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Strength of the change, up to 1. [default: 1 to edit, 0.8 to vary]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "--out", "-o", help="A file or a folder. [default: the current folder]"
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write one image with a row per prompt.")
    ] = False,
    trajectory: Annotated[
        bool,
        typer.Option(
            "--trajectory",
            help="Write all denoising steps of each image: the noisy image above, the predicted "
            "clean image below.",
        ),
    ] = False,
    preview: Annotated[
        bool, typer.Option(help="Preview the images in the terminal while they are denoised.")
    ] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed to stderr.")] = False,
    json: Json = False,
) -> None:
    """Generate small images."""
    prompts = prompts or ([""] if vary else [])
    _check_prompts(prompts, style, is_vary=vary is not None)
    _check_init_image(edit, mask, vary, strength, size)
    _check_output(output, len(prompts) * count, grid=grid, trajectory=trajectory)
    seed = secrets.randbits(31) if seed is None else seed
    started = time.perf_counter()
    from diffusion import SamplerOptions, image_io
    from serve.cli.ansi_preview import AnsiPreview
    from serve.models.images import ImageRequest

    flags: dict[str, Any] = {"steps": steps, "sampler": sampler, "guidance": guidance}
    try:
        plan = SamplerOptions(**{name: value for name, value in flags.items() if value is not None})
        init_image = _read_init_image(edit, mask, vary, strength)
        format = image_io.format_of(output) if output and _is_file_name(output) else "png"
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    files, pipeline = _load_pipeline(model)
    side = pipeline.size if edit else size or (128 if grid or trajectory else 256)
    suffix = f", {style} style" if style else ""
    resized = init_image and init_image.resized_to(pipeline.cfg.image_size)
    rows = [
        (ImageRequest(prompt=prompt + suffix, plan=plan, init_image=resized), seed, number)
        for prompt in prompts
        for number in range(count)
    ]
    loaded = time.perf_counter()
    show = AnsiPreview(sys.stderr) if preview else None
    generated = (
        (prompt, _postprocess(images, None if trajectory else init_image, side))
        for prompt, images in _generate(pipeline, rows, trajectory=trajectory, show=show)
    )
    paths: list[str] = []
    for prompt, pixels in _output_images(generated, columns=count if grid else None):
        path = _output_path(output, prompt if init_image is None else init_image.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_io.encode(pixels, format))
        paths.append(str(path))
        if not json:
            console.write(str(path))
    seconds = time.perf_counter() - loaded
    if json:
        console.write_json({"model": files.id, "seed": seed, "paths": paths})
    resizing = "" if side == pipeline.size else f", resized to {side} x {side}"
    console.info(f"seed {seed}; generated at {pipeline.size} x {pipeline.size}{resizing}")
    if stats:
        console.info(
            f"[load {loaded - started:.1f} s · {len(rows)} images in {seconds:.2f} s · "
            f"{plan.steps} steps of {plan.sampler}]"
        )


# --- checks of the arguments ----------------------------------------------------------------------


def _check_prompts(prompts: Sequence[str], style: str | None, *, is_vary: bool) -> None:
    if not prompts or not (all(map(str.strip, prompts)) or is_vary):
        raise WrongUsage('no prompt; describe the image, as in "a happy cat"')
    if style is not None and style not in STYLES:
        raise WrongUsage(f"--style {style}: use one of {', '.join(STYLES)}")


def _check_init_image(
    edit: Path | None,
    mask: Path | None,
    vary: Path | None,
    strength: float | None,
    size: int | None,
) -> None:
    if edit and vary:
        raise WrongUsage(
            "--edit (change a part of an image) and --vary (change all of it) cannot be combined; "
            "give one of them"
        )
    if mask and not edit:
        raise WrongUsage("--mask needs --edit FILE, the image to which the mask applies")
    if strength is not None and not (edit or vary):
        raise WrongUsage("--strength needs --edit or --vary")
    if strength is not None and not 0 < strength <= 1:
        raise WrongUsage(f"--strength {strength}: use a number above 0 and up to 1")
    if edit and size:
        raise WrongUsage("--size cannot be used with --edit, which keeps the size of the image")
    if absent := [file for file in (edit, mask, vary) if file and not file.is_file()]:
        raise NotFound(f"there is no file {absent[0]}")


def _check_output(output: Path | None, count: int, *, grid: bool, trajectory: bool) -> None:
    if grid and trajectory:
        raise WrongUsage("--grid and --trajectory cannot be combined; give one of them")
    if output and _is_file_name(output) and count > 1 and not grid:
        raise WrongUsage(
            f"cannot write {count} images to one file, {output}; give a folder with --output"
            + ("" if trajectory else ", or make one image with --grid")
        )


# --- initial images -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _InitImage:
    """The image that an edit or a variation starts from.

    Attributes:
        original: uint8 [Y, X, 3 or 4].
        mask: float32 [Y, X, 1], 1 where the image changes; None to change all of it.
        strength: the strength of the change, above 0 and up to 1.
        name: the first part of the names of output files.
    """

    original: "np.ndarray"
    mask: "np.ndarray | None"
    strength: float
    name: str

    def resized_to(self, size: int) -> "InitImage":
        """Return the image and its mask, resized to the input of the denoiser."""
        from diffusion import edit
        from serve.models.images import InitImage

        mask = None if self.mask is None else edit.preprocess_mask(self.mask, size)
        return InitImage(edit.preprocess_image(self.original, size), mask, self.strength)


def _load_pipeline(name: str) -> "tuple[ModelFiles, DiffusionPipeline]":
    from serve.cli import local

    files = local.locate_model_of_kind(name, "images", f"give --model {DEFAULT_MODEL}")
    assert files.encoder is not None
    import diffusion
    from serve.models.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    with local.report_load_errors(files):
        return files, diffusion.load(files.path, files.encoder)


def _read_init_image(
    edit: Path | None, mask: Path | None, vary: Path | None, strength: float | None
) -> _InitImage | None:
    """Return the initial image that the options select, or None.

    Raises:
        WrongUsage: a file is not an image, or the mask does not fit.
    """
    from diffusion.edit import VARIATION_STRENGTH, alpha_mask

    if vary:
        strength = VARIATION_STRENGTH if strength is None else strength
        return _InitImage(_read_image(vary), None, strength, f"{vary.stem}-varied")
    if not edit:
        return None
    original = _read_image(edit)
    alpha = alpha_mask(original if mask is None else _read_image(mask))
    if alpha.shape[:2] != original.shape[:2]:
        (height, width), (rows, columns) = original.shape[:2], alpha.shape[:2]
        raise WrongUsage(
            f"{mask} is {columns} x {rows} pixels but {edit} is {width} x {height}; "
            "give a mask of the same size"
        )
    if not alpha.any():
        raise WrongUsage(
            f"{mask or edit} has no transparent pixels; make it transparent where the image should "
            "change" + ("" if mask else ", or give --mask FILE")
        )
    if mask is None or (original[..., 3] == 255).all():
        original = original[..., :3]
    return _InitImage(original, alpha, 1.0 if strength is None else strength, f"{edit.stem}-edited")


def _read_image(file: Path) -> "np.ndarray":
    from diffusion import image_io

    try:
        return image_io.decode(file.read_bytes())
    except ValueError as error:
        raise WrongUsage(f"{file}: {error}") from None


# --- generation -----------------------------------------------------------------------------------


def _generate(
    pipeline: "DiffusionPipeline",
    rows: "Sequence[tuple[ImageRequest, int, int]]",
    *,
    trajectory: bool,
    show: "AnsiPreview | None",
) -> "Iterator[tuple[str, np.ndarray]]":
    """Generate images in batches.

    Args:
        pipeline: the model.
        rows: one tuple per image: its request, its seed, and its index within the request, as in
            `denoise_batch`.
        trajectory: whether to yield the images of all denoising steps instead of the final image.
        show: called with the predicted images after each step.

    Yields:
        A prompt and its image, uint8 [1, Y, X, 3]; with `trajectory` the noisy images of n steps
        and then the denoised images predicted in these steps, [2 n, Y, X, 3].
    """
    from diffusion.pipeline import to_uint8
    from serve.models.images import denoise_batch

    batch_size = rows[0][0].max_batch_size
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        steps = []
        for step in denoise_batch(pipeline, batch):
            steps.append(step)
            if show:
                show(to_uint8(step[1][: len(batch)]))
        if show:
            show.done()
        if len(rows) > batch_size:
            console.info(f"{start + len(batch)} of {len(rows)}")
        images = pipeline.postprocess(steps[-1][0])
        for row, (request, _, _) in enumerate(batch):
            yield (
                request.prompt,
                pipeline.trajectory_images(steps, row) if trajectory else images[row][None],
            )


def _postprocess(images: "np.ndarray", init_image: _InitImage | None, side: int) -> "np.ndarray":
    """Resize images, uint8 [B, Y, X, 3], or paste them into the masked part of the edited image."""
    import numpy as np

    from diffusion import upscale
    from diffusion.edit import paste

    if init_image is not None and init_image.mask is not None:
        return np.stack([paste(init_image.original, image, init_image.mask) for image in images])
    if side == images.shape[1]:
        return images
    return np.stack([upscale.resize(image, side) for image in images])


def _output_images(
    generated: "Iterable[tuple[str, np.ndarray]]", columns: int | None
) -> "Iterator[tuple[str, np.ndarray]]":
    """Yield each output image, uint8 [Y, X, 3], after the prompt that its file is named after.

    Args:
        generated: each prompt with its images, uint8 [B, Y, X, 3], as `_generate` yields them.
        columns: the number of columns of a single grid of all images; None for an output image per
            item of `generated`, which has two rows if the item has several images.
    """
    import numpy as np

    from diffusion.pipeline import make_grid

    if columns is None:
        for prompt, images in generated:
            yield prompt, make_grid(images, -(-len(images) // 2))
        return
    prompts, batches = zip(*generated, strict=True)
    yield prompts[0], make_grid(np.concatenate(batches), columns)


# --- output files ---------------------------------------------------------------------------------


def _is_file_name(path: Path) -> bool:
    """Return whether `--output` names a file, not a folder."""
    return path.suffix != "" and not path.is_dir()


def _output_path(output: Path | None, name: str) -> Path:
    """Return the path given by `--output`.

    If it is a folder, return a new file in it, named after `name`.
    """
    if output is not None and _is_file_name(output):
        return output
    folder = output or Path()
    stem = re.sub(r"[\W_]+", "-", name.lower()).strip("-")[:40].strip("-") or "picture"
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path
