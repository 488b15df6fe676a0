"""`pellucid image`, in this process: a tiny network of random weights, and the real encoder."""

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

SIZE = 16  # pixels of what the tiny model draws


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder, model_file):
    return diffusion.load(folder, model_file("all-minilm-l6-v2"))


@pytest.fixture
def image(folder, model_file, tmp_path, monkeypatch):
    """Runs the command in an empty folder, with few steps."""
    model_file("all-minilm-l6-v2")
    monkeypatch.chdir(tmp_path)

    def run(*arguments, steps=3):
        options = ["-m", f"tiny={folder}", "--steps", str(steps)]
        return CliRunner().invoke(app, ["image", *options, *map(str, arguments)])

    return run


@pytest.fixture
def photo(tmp_path):
    """A smooth picture, 24 x 40, whose right half is transparent: its file, and its pixels."""
    small = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((40, 24)))
    alpha = np.full((24, 40, 1), 255, np.uint8)
    alpha[:, 20:] = 0
    pixels = np.concatenate([pixels, alpha], -1)
    image_io.save(pixels, tmp_path / "photo.png")
    return tmp_path / "photo.png", pixels


def pixels(path):
    return np.asarray(Image.open(path))


def paths(done):
    assert done.exit_code == 0, done.stderr
    return done.stdout.splitlines()


def test_pictures_are_those_of_the_library_and_files_are_kept(image, tiny):
    done = image("a Red Apple!", "-n", 3, "--seed", 7, "--size", SIZE)
    assert paths(done) == ["a-red-apple.png", "a-red-apple-2.png", "a-red-apple-3.png"]
    assert names(done.stderr, "seed 7", "16 x 16")
    drawn = tiny.draw(
        ["a Red Apple!"] * 4, seed=7, plan=diffusion.SamplerOptions(steps=3)
    )  # 4: as batches
    for path, expected in zip(paths(done), drawn, strict=False):
        np.testing.assert_array_equal(pixels(path), expected)
    assert paths(image("a red apple", "--seed", 8)) == ["a-red-apple-4.png"]
    assert pixels("a-red-apple-4.png").shape == (256, 256, 3)
    assert paths(image("?", "-o", "new/folder")) == ["new/folder/picture.png"]


def test_without_a_seed_one_is_chosen_and_said(image):
    first = json.loads(image("a cat", "--size", SIZE, "--json").stdout)
    assert first["model"] == "tiny"
    again = json.loads(
        image("a cat", "--size", SIZE, "--json", "--seed", first["seed"], "-o", "x.png").stdout
    )
    assert again == {"model": "tiny", "seed": first["seed"], "paths": ["x.png"]}
    np.testing.assert_array_equal(pixels(first["paths"][0]), pixels("x.png"))
    other = json.loads(image("a cat", "--size", SIZE, "--json").stdout)
    assert other["seed"] != first["seed"] and other["paths"] == ["a-cat-2.png"]


def test_a_sheet_has_a_row_for_each_prompt(image):
    done = image("a cat", "a dog", "-n", 5, "--grid", "--seed", 1, "--size", SIZE, "-o", "g.webp")
    assert paths(done) == ["g.webp"]
    with Image.open("g.webp") as sheet:
        assert (sheet.format, sheet.size) == ("WEBP", (5 * SIZE, 2 * SIZE))
    assert done.stderr.splitlines()[:2] == ["8 of 10", "10 of 10"]  # batches
    assert paths(image("a cat", "-n", 5, "--grid", "--size", SIZE, "--seed", 1)) == ["a-cat.png"]
    row = pixels("a-cat.png")
    assert row.shape == (SIZE, 5 * SIZE, 3)
    assert len({row[:, x : x + SIZE].tobytes() for x in range(0, 5 * SIZE, SIZE)}) == 5


def test_options_reach_the_sampler(image, tiny):
    common = ("a cat", "--size", SIZE, "--seed", 3, "-o", "x.png")
    for options, plan in (
        (("--rule", "heun"), {"rule": "heun"}),
        (("--guidance", 6), {"guidance": 6.0}),
    ):
        assert paths(image(*common, *options)) == ["x.png"]
        expected = tiny.draw(["a cat"], seed=3, plan=diffusion.SamplerOptions(steps=3, **plan))
        np.testing.assert_array_equal(pixels("x.png"), expected[0])
    paths(image(*common, "--style", "flat"))
    expected = tiny.draw(["a cat, flat style"], seed=3, plan=diffusion.SamplerOptions(steps=3))
    np.testing.assert_array_equal(pixels("x.png"), expected[0])


def test_a_strip_shows_how_a_picture_came(image, tiny):
    assert paths(image("a cat", "--strip", "--seed", 3, "--size", SIZE)) == ["a-cat.png"]
    plan = diffusion.SamplerOptions(steps=3)
    steps = list(tiny.steps(["a cat"], sample.image_keys(3, 1), plan))
    strip = pixels("a-cat.png")
    np.testing.assert_array_equal(strip, pipeline.make_grid(tiny.strip(steps), 3))
    assert strip.shape == (2 * SIZE, 3 * SIZE, 3)
    np.testing.assert_array_equal(strip[:SIZE, -SIZE:], tiny.draw(["a cat"], seed=3, plan=plan)[0])


def test_an_edit_changes_only_what_is_transparent(image, photo):
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


def test_variations_are_drawn_from_a_picture(image, tiny, photo):
    path, original = photo
    done = image("--vary", path, "--strength", 0.5, "--seed", 2, "--size", SIZE, steps=6)
    assert paths(done) == ["photo-varied.png"]
    plan = diffusion.SamplerOptions(steps=6)
    seen = edit.preprocess_image(original, SIZE // 2)[None]
    keys = sample.image_keys(2, 1)
    *_, (last, _) = edit.steps(tiny, [""], keys, plan, images=seen, strength=0.5)
    np.testing.assert_array_equal(pixels("photo-varied.png"), tiny.finish(last)[0])
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
        (["a cat", "--grid", "--strip"], ["--grid", "--strip"]),
        (["a cat", "-n", "2", "-o", "x.png"], [2, "x.png", "--output"]),
        (["a cat", "-o", "x.gif"], ["x.gif", ".png"]),
        (["a cat", "--rule", "magic"], ["rule", "'magic'"]),
        (["a cat", "--guidance", "nan"], ["guidance", 30, "nan"]),
        (["a cat", "--vary", "text.png"], ["text.png"]),
        (["a cat", "--edit", "whole.png"], ["whole.png", "--mask"]),
        (["a cat", "--edit", "whole.png", "--mask", "small.png"], ["small.png", "3 x 2"]),
        (["a cat", "-m", "all-minilm-l6-v2"], ["all-minilm-l6-v2", "emoji-64"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_drawn(image, photo, tmp_path, arguments, facts):
    (tmp_path / "text.png").write_text("no picture")
    image_io.save(photo[1][..., :3], tmp_path / "whole.png")
    image_io.save(np.zeros((2, 3, 4), np.uint8), tmp_path / "small.png")
    before = set(tmp_path.iterdir())
    done = image(*arguments)
    assert done.exit_code == 2 and names(done.stderr, *facts) and not done.stdout
    assert set(tmp_path.iterdir()) == before


def test_a_file_that_is_not_there(image):
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


def test_two_rows_of_pixels_are_a_line_of_text():
    pictures = np.zeros((1, 4, 2, 3), np.uint8)
    pictures[0, 0, 0], pictures[0, 1, 1] = (255, 0, 9), 255
    first, second = ansi_preview.half_blocks(pictures, truecolor=True)
    assert first == ("\x1b[38;2;255;0;9;48;2;0;0;0m▀\x1b[38;2;0;0;0;48;2;255;255;255m▀\x1b[0m ")
    assert second == "\x1b[38;2;0;0;0;48;2;0;0;0m▀" * 2 + "\x1b[0m "
    few = ansi_preview.half_blocks(pictures, truecolor=False)
    assert few[0] == "\x1b[38;5;196;48;5;16m▀\x1b[38;5;16;48;5;231m▀\x1b[0m "


def test_a_preview_is_drawn_over_the_last_one(wide):
    stream = Terminal()
    show = ansi_preview.AnsiPreview(stream)
    show(np.zeros((5, 8, 8, 3), np.uint8))
    lines = stream.getvalue().splitlines()
    assert [line.count("▀") for line in lines] == [2 * 8] * 4  # room for two of the five
    stream.seek(0)
    show(np.zeros((5, 8, 8, 3), np.uint8))
    assert stream.getvalue().startswith("\x1b[4A") and stream.getvalue().count("\n") == 4
    show.done()
    stream.seek(0)
    show(np.zeros((5, 8, 8, 3), np.uint8))
    assert stream.getvalue().startswith("\x1b[38")


@pytest.mark.parametrize("why", ["no terminal", "no colour", "narrow", "low"])
def test_nothing_is_shown_where_it_would_not_fit(wide, monkeypatch, why):
    stream = io.StringIO() if why == "no terminal" else Terminal()
    changed = {"no colour": ("NO_COLOR", "1"), "narrow": ("COLUMNS", "8"), "low": ("LINES", "4")}
    if why in changed:
        monkeypatch.setenv(*changed[why])
    ansi_preview.AnsiPreview(stream)(np.zeros((1, 8, 8, 3), np.uint8))
    assert stream.getvalue() == ""


def test_pictures_are_resized_as_asked(image, tiny):
    paths(image("a cat", "--seed", 3, "--size", 40, "-o", "x.jpg"))
    drawn = tiny.draw(["a cat"], seed=3, plan=diffusion.SamplerOptions(steps=3))[0]
    expected = image_io.encode(upscale.resize(drawn, 40), "jpeg")
    with open("x.jpg", "rb") as file:
        assert file.read() == expected
