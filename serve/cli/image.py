"""`pellucid image`: pictures from words, and from pictures.

Each picture becomes a file, whose path goes to stdout; a file that is there already is overwritten
only if `--output` names it. What the model draws is small (emoji-64: 64 x 64 pixels), and `--size`
enlarges it and says so. In a terminal with colour one sees the pictures come.

They are drawn side by side, in the batches that a server makes (`engine.drawing`), for which
programs are compiled once and kept. So pictures of one prompt and a seed have the same bytes here
and there.
"""

import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
STYLES = ("shaded", "flat", "3d")  # as the captions of `diffusion.data` say them


def image(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help='As in "a happy cat".')
    ] = None,
    model: Annotated[
        str,
        model_option("A model of `pellucid models` that draws, or NAME=PATH for a folder."),
    ] = DEFAULT_MODEL,
    count: Annotated[int, typer.Option("-n", min=1, max=100, help="Pictures of each.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same pictures."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=16, max=1024, help="Pixels of a side, resized. [default: 256; 128 on a sheet]"
        ),
    ] = None,
    style: Annotated[str | None, typer.Option(help=f"One of {', '.join(STYLES)}.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of denoising. [default: 20]")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, ddim, ddpm, heun or dpmpp. [default: dpmpp]")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Above 1: more as the prompt says. [default: 3]")
    ] = None,
    edit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw what is transparent in this picture."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --edit: a picture that is transparent there."),
    ] = None,
    vary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw others like this picture.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Of the change, up to 1. [default: 1 to edit, 0.8 to vary]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", "-o", help="A file or a folder. [default: here]"),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="One file, with a row a prompt.")] = False,
    trajectory: Annotated[
        bool,
        typer.Option(
            "--strip", help="How each comes: noisy above, what the model sees in it below."
        ),
    ] = False,
    preview: Annotated[
        bool, typer.Option(help="Show the pictures in the terminal as they come.")
    ] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed to stderr.")] = False,
    json: Json = False,
) -> None:
    """Draw small pictures."""
    given = prompts or ([""] if vary else [])
    _check_prompts(given, style, is_vary=vary is not None)
    _check_init_image(edit, mask, vary, strength, size)
    _check_output(output, len(given) * count, grid=grid, strip=trajectory)
    seed = secrets.randbits(31) if seed is None else seed
    started = time.perf_counter()
    from diffusion import SamplerOptions, image_io
    from serve.cli.ansi_preview import AnsiPreview
    from serve.models.images import ImageRequest

    wishes = {"steps": steps, "sampler": sampler, "guidance": guidance}
    try:
        plan = SamplerOptions(
            **{name: value for name, value in wishes.items() if value is not None}
        )
        source = _read_init_image(edit, mask, vary, strength)
        format = image_io.format_of(output) if output and _is_file_name(output) else "png"
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    place, painter = _load_pipeline(model)
    side = painter.size if edit else size or (128 if grid or trajectory else 256)
    ending = f", {style} style" if style else ""
    fitted = source and source.resized_to(painter.cfg.image_size)
    rows = [
        (ImageRequest(prompt=prompt + ending, plan=plan, init_image=fitted), seed, number)
        for prompt in given
        for number in range(count)
    ]
    loaded = time.perf_counter()
    show = AnsiPreview(sys.stderr) if preview else None
    drawn = (
        (prompt, _postprocess(pictures, None if trajectory else source, side))
        for prompt, pictures in _generate(painter, rows, strip=trajectory, show=show)
    )
    paths: list[str] = []
    for prompt, sheet in _output_images(drawn, columns=count if grid else None):
        path = _output_path(output, prompt if source is None else source.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_io.encode(sheet, format))
        paths.append(str(path))
        if not json:
            console.write(str(path))
    seconds = time.perf_counter() - loaded
    if json:
        console.write_json({"model": place.id, "seed": seed, "paths": paths})
    resized = "" if side == painter.size else f", resized to {side} x {side}"
    console.info(f"seed {seed}; drawn at {painter.size} x {painter.size}{resized}")
    if stats:
        console.info(
            f"[load {loaded - started:.1f} s · {len(rows)} pictures in {seconds:.2f} s · "
            f"{plan.steps} steps of {plan.sampler}]"
        )


# --- what may be asked ----------------------------------------------------------------------------


def _check_prompts(prompts: Sequence[str], style: str | None, *, is_vary: bool) -> None:
    if not prompts or not (all(map(str.strip, prompts)) or is_vary):
        raise WrongUsage('there is no prompt: say what to draw, as in "a happy cat"')
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
        raise WrongUsage("--edit changes a part and --vary all: use one of them")
    if mask and not edit:
        raise WrongUsage("--mask says what of --edit FILE is to change: give both")
    if strength is not None and not (edit or vary):
        raise WrongUsage("--strength is for --edit and --vary")
    if strength is not None and not 0 < strength <= 1:
        raise WrongUsage(f"--strength {strength}: use a number above 0, up to 1")
    if edit and size:
        raise WrongUsage("what is edited keeps the size of its file: leave --size out")
    if absent := [file for file in (edit, mask, vary) if file and not file.is_file()]:
        raise NotFound(f"there is no file {absent[0]}")


def _check_output(output: Path | None, count: int, *, grid: bool, strip: bool) -> None:
    if grid and strip:
        raise WrongUsage("use one of --grid and --strip")
    if output and _is_file_name(output) and count > 1 and not grid:
        raise WrongUsage(
            f"{count} files cannot all be {output}: let --output name a folder"
            + ("" if strip else ", or make one sheet with --grid")
        )


# --- what is drawn from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _InitImage:
    """What pictures are drawn from.

    Attributes:
        original: uint8 [Y, X, 3 or 4].
        mask: float32 [Y, X, 1], 1 where it changes; None where all does.
        name: how the files begin that are made of it.
    """

    original: "np.ndarray"
    mask: "np.ndarray | None"
    strength: float
    name: str

    def resized_to(self, size: int) -> "InitImage":
        """Return it at the size of the denoiser."""
        from diffusion import edit
        from serve.models.images import InitImage

        mask = None if self.mask is None else edit.preprocess_mask(self.mask, size)
        return InitImage(edit.preprocess_image(self.original, size), mask, self.strength)


def _load_pipeline(name: str) -> "tuple[ModelFiles, DiffusionPipeline]":
    from serve.cli import local

    place = local.locate_model_of_kind(name, "images", f"{DEFAULT_MODEL} does")
    assert place.encoder is not None
    import diffusion
    from serve.models.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    with local.report_load_errors(place):
        return place, diffusion.load(place.path, place.encoder)


def _read_init_image(
    edit: Path | None, mask: Path | None, vary: Path | None, strength: float | None
) -> _InitImage | None:
    """What the options say of pictures to draw from.

    Raises:
        ValueError: a file is no picture.
    """
    from diffusion.edit import VARIATION_STRENGTH, alpha_mask

    if vary:
        chosen = VARIATION_STRENGTH if strength is None else strength
        return _InitImage(_read_image(vary), None, chosen, f"{vary.stem}-varied")
    if not edit:
        return None
    original = _read_image(edit)
    hole = alpha_mask(original if mask is None else _read_image(mask))
    if hole.shape[:2] != original.shape[:2]:
        (height, width), (rows, columns) = original.shape[:2], hole.shape[:2]
        raise WrongUsage(
            f"{mask} is {columns} x {rows} pixels and {edit} {width} x {height}: "
            "a mask has the size of its picture"
        )
    if not hole.any():
        raise WrongUsage(
            f"nothing in {mask or edit} is transparent: what is to change must be"
            + ("" if mask else ", here or in --mask FILE")
        )
    if mask is None or (original[..., 3] == 255).all():
        original = original[..., :3]
    return _InitImage(original, hole, 1.0 if strength is None else strength, f"{edit.stem}-edited")


def _read_image(file: Path) -> "np.ndarray":
    from diffusion import image_io

    try:
        return image_io.decode(file.read_bytes())
    except ValueError as error:
        raise WrongUsage(f"{file}: {error}") from None


# --- drawing --------------------------------------------------------------------------------------


def _generate(
    painter: "DiffusionPipeline",
    rows: "Sequence[tuple[ImageRequest, int, int]]",
    *,
    strip: bool,
    show: "AnsiPreview | None",
) -> "Iterator[tuple[str, np.ndarray]]":
    """Draws pictures in batches.

    Args:
        rows: as of `batch_steps`.
        show: gets what the model sees after each step.

    Yields:
        A prompt and its picture, uint8 [1, Y, X, 3]; or a strip of how it came, [2 n, Y, X, 3].
    """
    from diffusion.pipeline import to_uint8
    from serve.models.images import denoise_batch

    most = rows[0][0].max_batch_size
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        steps = []
        for step in denoise_batch(painter, part):
            steps.append(step)
            if show:
                show(to_uint8(step[1][: len(part)]))
        if show:
            show.done()
        if len(rows) > most:
            console.info(f"{start + len(part)} of {len(rows)}")
        finished = painter.postprocess(steps[-1][0])
        for row, (order, _, _) in enumerate(part):
            yield (
                order.prompt,
                painter.trajectory_images(steps, row) if strip else finished[row][None],
            )


def _postprocess(pictures: "np.ndarray", source: _InitImage | None, side: int) -> "np.ndarray":
    """Enlarge pictures, uint8 [B, Y, X, 3]; one that is edited is put into the hole instead."""
    import numpy as np

    from diffusion import upscale
    from diffusion.edit import paste

    if source is not None and source.mask is not None:
        return np.stack([paste(source.original, one, source.mask) for one in pictures])
    if side == pictures.shape[1]:
        return pictures
    return np.stack([upscale.resize(one, side) for one in pictures])


def _output_images(
    drawn: "Iterable[tuple[str, np.ndarray]]", columns: int | None
) -> "Iterator[tuple[str, np.ndarray]]":
    """Yield pictures to be written, uint8 [Y, X, 3], and a prompt to name each after.

    Args:
        drawn: prompts with pictures, uint8 [B, Y, X, 3].
        columns: of one sheet of them all; None for one of each, in two rows if there are several.
    """
    import numpy as np

    from diffusion.pipeline import make_grid

    if columns is None:
        for prompt, pictures in drawn:
            yield prompt, make_grid(pictures, -(-len(pictures) // 2))
        return
    prompts, pictures = zip(*drawn, strict=True)
    yield prompts[0], make_grid(np.concatenate(pictures), columns)


# --- where it goes --------------------------------------------------------------------------------


def _is_file_name(path: Path) -> bool:
    """Whether `--output` names a file, not a folder."""
    return path.suffix != "" and not path.is_dir()


def _output_path(output: Path | None, name: str) -> Path:
    """The file that `--output` names, or a new one there, named after the prompt."""
    if output is not None and _is_file_name(output):
        return output
    folder = output or Path()
    stem = re.sub(r"[\W_]+", "-", name.lower()).strip("-")[:40].strip("-") or "picture"
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path
