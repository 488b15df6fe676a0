"""The command `pellucid image` in this process: a tiny random network and the real encoder."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import diffusion
from diffusion import edit, image_io, pipeline, sample, upscale
from serve.cli import ansi_preview
from serve.cli.main import app
from tests.diffusion.conftest import save_tiny
from tests.naming import names

pytestmark = pytest.mark.heavy

SIZE = 16  # pixels of the images of the tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder, model_file):
    return diffusion.load(folder, model_file("all-minilm-l6-v2"))


@pytest.fixture
def image(folder, model_file, tmp_path, monkeypatch):
    """Return a function that runs the command in an empty folder, with few steps."""
    model_file("all-minilm-l6-v2")
    monkeypatch.chdir(tmp_path)

    def run(*arguments, steps=3):
        options = ["-m", f"tiny={folder}", "--steps", str(steps)]
        return CliRunner().invoke(app, ["image", *options, *map(str, arguments)])

    return run


@pytest.fixture
def photo(tmp_path):
    """Return a smooth image, 24 x 40, with a transparent right half: its file and its pixels."""
    small = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((40, 24)))
    alpha = np.full((24, 40, 1), 255, np.uint8)
    alpha[:, 20:] = 0
    pixels = np.concatenate([pixels, alpha], -1)
    image_io.save(pixels, tmp_path / "photo.png")
    return tmp_path / "photo.png", pixels


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def paths(done):
    assert done.exit_code == 0, done.stderr
    return done.stdout.splitlines()


def test_images_equal_those_of_the_library_and_overwrite_no_file(image, tiny):
    done = image("a Red Apple!", "-n", 3, "--seed", 7, "--size", SIZE)
    assert paths(done) == ["a-red-apple.png", "a-red-apple-2.png", "a-red-apple-3.png"]
    assert names(done.stderr, "seed 7", "16 x 16")
    options = diffusion.SamplerOptions(steps=3)
    images = tiny.generate(["a Red Apple!"] * 4, seed=7, options=options)  # a padded batch has 4
    for path, expected in zip(paths(done), images, strict=False):
        np.testing.assert_array_equal(pixels(path), expected)
    assert paths(image("a red apple", "--seed", 8)) == ["a-red-apple-4.png"]
    assert pixels("a-red-apple-4.png").shape == (256, 256, 3)
    assert paths(image("?", "-o", "new/folder")) == ["new/folder/picture.png"]


def test_seed_is_random_and_printed_by_default(image):
    first = json.loads(image("a cat", "--size", SIZE, "--json").stdout)
    assert first["model"] == "tiny"
    again = json.loads(
        image("a cat", "--size", SIZE, "--json", "--seed", first["seed"], "-o", "x.png").stdout
    )
    assert again == {"model": "tiny", "seed": first["seed"], "paths": ["x.png"]}
    np.testing.assert_array_equal(pixels(first["paths"][0]), pixels("x.png"))
    other = json.loads(image("a cat", "--size", SIZE, "--json").stdout)
    assert other["seed"] != first["seed"] and other["paths"] == ["a-cat-2.png"]


def test_grid_has_a_row_for_each_prompt(image):
    done = image("a cat", "a dog", "-n", 5, "--grid", "--seed", 1, "--size", SIZE, "-o", "g.webp")
    assert paths(done) == ["g.webp"]
    with Image.open("g.webp") as grid:
        assert (grid.format, grid.size) == ("WEBP", (5 * SIZE, 2 * SIZE))
    assert done.stderr.splitlines()[:2] == ["8 of 10", "10 of 10"]  # batches
    assert paths(image("a cat", "-n", 5, "--grid", "--size", SIZE, "--seed", 1)) == ["a-cat.png"]
    row = pixels("a-cat.png")
    assert row.shape == (SIZE, 5 * SIZE, 3)
    assert len({row[:, x : x + SIZE].tobytes() for x in range(0, 5 * SIZE, SIZE)}) == 5


def test_options_of_command_reach_the_sampler(image, tiny):
    common = ("a cat", "--size", SIZE, "--seed", 3, "-o", "x.png")
    for flags, fields in (
        (("--sampler", "heun"), {"sampler": "heun"}),
        (("--guidance", 6), {"guidance": 6.0}),
    ):
        assert paths(image(*common, *flags)) == ["x.png"]
        options = diffusion.SamplerOptions(steps=3, **fields)
        expected = tiny.generate(["a cat"], seed=3, options=options)
        np.testing.assert_array_equal(pixels("x.png"), expected[0])
    paths(image(*common, "--style", "flat"))
    options = diffusion.SamplerOptions(steps=3)
    expected = tiny.generate(["a cat, flat style"], seed=3, options=options)
    np.testing.assert_array_equal(pixels("x.png"), expected[0])


def test_trajectory_shows_all_steps(image, tiny):
    assert paths(image("a cat", "--trajectory", "--seed", 3, "--size", SIZE)) == ["a-cat.png"]
    options = diffusion.SamplerOptions(steps=3)
    steps = list(tiny.steps(["a cat"], sample.image_keys(3, 1), options))
    trajectory = pixels("a-cat.png")
    expected = pipeline.make_grid(tiny.trajectory_images(steps), 3)
    np.testing.assert_array_equal(trajectory, expected)
    assert trajectory.shape == (2 * SIZE, 3 * SIZE, 3)
    last = tiny.generate(["a cat"], seed=3, options=options)[0]
    np.testing.assert_array_equal(trajectory[:SIZE, -SIZE:], last)


def test_edit_changes_transparent_pixels_only(image, photo):
    path, original = photo
    done = image("a dog", "-n", 5, "--edit", path, "--seed", 1)
    assert paths(done)[0] == "photo-edited.png" and len(paths(done)) == 5
    results = [pixels(path) for path in paths(done)]
    for result in results:
        assert result.shape == (24, 40, 3)
        np.testing.assert_array_equal(result[:, :20], original[:, :20, :3])
    assert (results[0][:, 20:] != results[4][:, 20:]).any()
    image_io.save(original[..., :3], path.with_name("whole.png"))
    done = image("a dog", "--edit", "whole.png", "--mask", path, "--seed", 1, "-o", "masked.png")
    assert paths(done) == ["masked.png"] and pixels("masked.png").shape == (24, 40, 3)
    np.testing.assert_array_equal(pixels("masked.png")[:, :20], original[:, :20, :3])


def test_variation_equals_that_of_the_library(image, tiny, photo):
    path, original = photo
    done = image("--vary", path, "--strength", 0.5, "--seed", 2, "--size", SIZE, steps=6)
    assert paths(done) == ["photo-varied.png"]
    options = diffusion.SamplerOptions(steps=6)
    init_image = edit.preprocess_image(original, SIZE // 2)[None]
    keys = sample.image_keys(2, 1)
    *_, (last, _) = edit.steps(tiny, [""], keys, options, images=init_image, strength=0.5)
    np.testing.assert_array_equal(pixels("photo-varied.png"), tiny.postprocess(last)[0])
    paths(image("a dog", "--vary", path, "--seed", 2, "--size", SIZE, "-o", "dog.png"))
    assert (pixels("dog.png") != pixels("photo-varied.png")).any()


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ([], ["prompt"]),
        ([" "], ["prompt"]),
        (["a cat", "--style", "oil"], ["--style", "oil", "shaded", "flat", "3d"]),
        (["a cat", "--edit", "photo.png", "--vary", "photo.png"], ["--edit", "--vary"]),
        (["a cat", "--mask", "photo.png"], ["--mask", "--edit"]),
        (["a cat", "--strength", "0.5"], ["--strength", "--edit", "--vary"]),
        (["a cat", "--vary", "photo.png", "--strength", "nan"], ["--strength", "nan"]),
        (["a cat", "--edit", "photo.png", "--size", "64"], ["--size"]),
        (["a cat", "--grid", "--trajectory"], ["--grid", "--trajectory"]),
        (["a cat", "-n", "2", "-o", "x.png"], [2, "x.png", "--output"]),
        (["a cat", "-o", "x.gif"], ["x.gif", ".png"]),
        (["a cat", "--sampler", "magic"], ["heun", "'magic'"]),
        (["a cat", "--guidance", "nan"], ["guidance", 30, "nan"]),
        (["a cat", "--vary", "text.png"], ["text.png"]),
        (["a cat", "--edit", "whole.png"], ["whole.png", "--mask"]),
        (["a cat", "--edit", "whole.png", "--mask", "small.png"], ["small.png", "3 x 2"]),
        (["a cat", "-m", "all-minilm-l6-v2"], ["all-minilm-l6-v2", "emoji-64"]),
    ],
)
def test_wrong_usage_exits_with_2_and_writes_nothing(image, photo, tmp_path, arguments, facts):
    (tmp_path / "text.png").write_text("no image")
    image_io.save(photo[1][..., :3], tmp_path / "whole.png")
    image_io.save(np.zeros((2, 3, 4), np.uint8), tmp_path / "small.png")
    before = set(tmp_path.iterdir())
    done = image(*arguments)
    assert done.exit_code == 2 and names(done.stderr, *facts) and not done.stdout
    assert set(tmp_path.iterdir()) == before


def test_missing_file_exits_with_3(image):
    done = image("a cat", "--vary", "absent.png")
    assert done.exit_code == 3 and names(done.stderr, "absent.png")


# --- in a terminal ----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def wide(monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "20", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)


def test_half_blocks_show_two_rows_per_line():
    pictures = np.zeros((1, 4, 2, 3), np.uint8)
    pictures[0, 0, 0], pictures[0, 1, 1] = (255, 0, 9), 255
    first, second = ansi_preview.half_blocks(pictures, truecolor=True)
    assert first == ("\x1b[38;2;255;0;9;48;2;0;0;0m▀\x1b[38;2;0;0;0;48;2;255;255;255m▀\x1b[0m ")
    assert second == "\x1b[38;2;0;0;0;48;2;0;0;0m▀" * 2 + "\x1b[0m "
    few = ansi_preview.half_blocks(pictures, truecolor=False)
    assert few[0] == "\x1b[38;5;196;48;5;16m▀\x1b[38;5;16;48;5;231m▀\x1b[0m "


def test_preview_overwrites_the_previous_one(wide):
    stream = Terminal()
    show = ansi_preview.AnsiPreview(stream)
    show(np.zeros((5, 8, 8, 3), np.uint8))
    lines = stream.getvalue().splitlines()
    assert [line.count("▀") for line in lines] == [2 * 8] * 4  # two of the five fit
    stream.seek(0)
    show(np.zeros((5, 8, 8, 3), np.uint8))
    assert stream.getvalue().startswith("\x1b[4A") and stream.getvalue().count("\n") == 4
    show.done()
    stream.seek(0)
    show(np.zeros((5, 8, 8, 3), np.uint8))
    assert stream.getvalue().startswith("\x1b[38")


@pytest.mark.parametrize("why", ["no terminal", "no colour", "narrow", "low"])
def test_preview_without_room_or_colour_writes_nothing(wide, monkeypatch, why):
    stream = io.StringIO() if why == "no terminal" else Terminal()
    changed = {"no colour": ("NO_COLOR", "1"), "narrow": ("COLUMNS", "8"), "low": ("LINES", "4")}
    if why in changed:
        monkeypatch.setenv(*changed[why])
    ansi_preview.AnsiPreview(stream)(np.zeros((1, 8, 8, 3), np.uint8))
    assert stream.getvalue() == ""


def test_option_size_resizes_images(image, tiny):
    paths(image("a cat", "--seed", 3, "--size", 40, "-o", "x.jpg"))
    options = diffusion.SamplerOptions(steps=3)
    generated = tiny.generate(["a cat"], seed=3, options=options)[0]
    expected = image_io.encode(upscale.resize(generated, 40), "jpeg")
    with open("x.jpg", "rb") as file:
        assert file.read() == expected
