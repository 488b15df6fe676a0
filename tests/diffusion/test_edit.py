"""Drawing from pictures, with a tiny network and the real reader; and picture files."""

import contextlib
import io
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffusion
from diffusion import edit, image_io, pipeline, sample, schedule
from diffusion.pipeline import SamplerOptions
from tests.diffusion.conftest import dummy
from tests.naming import naming

RANDOM = np.random.default_rng(0)
PLAN = SamplerOptions(steps=6, sampler="ddim")


def last(found, prompts, plan=PLAN, *, seed=0, pictures, **kw):
    """The picture at the end of an edit, and float32."""
    keys = sample.image_keys(seed, len(prompts))
    *_, (drawn, _) = edit.steps(found, prompts, keys, plan, images=pictures, **kw)
    return np.asarray(drawn)


@pytest.fixture(scope="module")
def sources():
    """Three smooth pictures of 8 x 8: float32, -1 to 1."""
    small = RANDOM.uniform(-0.9, 0.9, (3, 2, 2, 3)).astype(np.float32)
    return np.repeat(np.repeat(small, 4, 1), 4, 2)


def test_little_strength_resembles_and_all_of_it_forgets(tiny, sources):
    one, other = sources[:1], sources[1:2]
    far = [
        np.abs(last(tiny, ["a cat"], pictures=one, strength=s) - one).mean()
        for s in (0.02, 0.5, 1.0)
    ]
    assert far[0] < 0.05 < far[1] < far[2]
    fresh = last(tiny, ["a cat"], pictures=one, strength=1.0)
    np.testing.assert_array_equal(fresh, last(tiny, ["a cat"], pictures=other, strength=1.0))
    *_, (drawn, _) = tiny.steps(["a cat"], sample.image_keys(0, 1), PLAN)
    np.testing.assert_array_equal(fresh, drawn)


def test_strength_is_the_share_of_the_steps_that_is_taken(tiny, sources):
    for strength, count in ((0.01, 1), (0.5, 3), (0.75, 4), (1.0, 6)):
        given = dict(pictures=sources[:1], strength=strength)
        found = list(edit.steps(tiny, ["a cat"], sample.image_keys(0, 1), PLAN, **given))
        assert len(found) == count and found[0][0].shape == found[0][1].shape == (1, 8, 8, 3)


def test_pictures_follow_from_seed_and_prompt(tiny, sources):
    given = dict(pictures=sources[:1], strength=0.7)
    drawn = last(tiny, ["a cat"], seed=1, **given)
    np.testing.assert_array_equal(last(tiny, ["a cat"], seed=1, **given), drawn)
    assert (last(tiny, ["a cat"], seed=2, **given) != drawn).any()
    assert (last(tiny, ["a dog"], seed=1, **given) != drawn).any()


@pytest.mark.parametrize("rule", ["ddpm", "dpmpp"])
def test_a_picture_does_not_depend_on_its_batch(tiny, sources, rule):
    plan = SamplerOptions(steps=4, sampler=rule)
    masks = np.zeros((3, 8, 8, 1), np.float32)
    masks[:, :, 4:] = 1
    prompts = ["a cat", "a dog", "a red apple"]
    drawn = last(tiny, prompts, plan, pictures=sources, masks=masks, strength=0.8)
    alone = last(tiny, prompts[:1], plan, pictures=sources[:1], masks=masks[:1], strength=0.8)
    np.testing.assert_allclose(alone, drawn[:1], atol=1e-5)


@pytest.mark.parametrize("rule", sample.SAMPLERS)
def test_what_is_kept_is_the_original_under_the_noise_of_every_level(rule):
    """RePaint's replacement follows from telling the sampler the clean picture, in every rule."""
    original = jnp.asarray(RANDOM.uniform(-1, 1, (1, 4, 4, 3)), jnp.float32)
    mask = jnp.zeros((1, 4, 4, 1)).at[:, 2:].set(1.0)
    e = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    denoise = edit.inpaint_denoiser(dummy, original, mask)
    levels = schedule.flow_levels(6)
    keys = sample.image_keys(0, 1)
    walked = list(sample.steps(denoise, e, levels, rule, keys=keys))
    for step, level in zip(walked, levels[1:], strict=True):
        if rule != "ddpm":  # whose noise is fresh
            noised = level.alpha * original + level.sigma * e
            np.testing.assert_allclose(step.noisy[:, :2], noised[:, :2], atol=1e-5)
    np.testing.assert_allclose(walked[-1].noisy[:, :2], original[:, :2], atol=1e-6)
    free = sample.sample(dummy, e, levels, rule, keys=keys)
    np.testing.assert_allclose(walked[-1].noisy[:, 2:], free[:, 2:], atol=1e-6)  # dummy is local


def test_the_network_sees_what_is_kept(tiny, sources):
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, 2:6, 2:6] = 1
    drawn = [last(tiny, ["a cat"], pictures=sources[i : i + 1], masks=mask) for i in (0, 1)]
    for i in (0, 1):
        kept = np.abs(drawn[i] - sources[i])[mask[..., 0] == 0]
        np.testing.assert_allclose(kept, 0, atol=1e-5)
    assert np.abs(drawn[0] - drawn[1])[mask[..., 0] == 1].max() > 1e-3


def test_more_noise_is_as_much_as_the_level_has():
    here, there = schedule.from_flow(0.6), schedule.from_flow(0.3)
    x = jnp.linspace(-1, 1, 8)
    e, fresh = RANDOM.standard_normal((2, 50_000, 8)).astype(np.float32)
    found = edit.renoise(here.alpha * x + here.sigma * e, here, there, fresh)
    np.testing.assert_allclose(found.mean(0), there.alpha * x, atol=0.02)
    np.testing.assert_allclose(found.std(0), there.sigma, atol=0.01)


def test_errors_say_what_is_wrong(tiny, sources):
    keys = sample.image_keys(0, 1)
    for given, facts in (
        (dict(pictures=sources[:1], strength=0.0), ["strength", 0.0]),
        (dict(pictures=sources[:1], strength=1.5), ["strength", 1.5]),
        (dict(pictures=sources[:2]), ["images", [1, 8, 8, 3], [2, 8, 8, 3]]),
        (dict(pictures=sources[:1], masks=sources[:1]), ["masks", [1, 8, 8, 1], [1, 8, 8, 3]]),
    ):
        with pytest.raises(ValueError, match=naming(*facts)):
            next(edit.steps(tiny, ["a cat"], keys, PLAN, **given))


def test_fitting_averages_areas_and_lays_on_white():
    grey = RANDOM.integers(0, 256, (8, 8, 3), np.uint8)
    means = grey.reshape(4, 2, 4, 2, 3).mean((1, 3))
    np.testing.assert_allclose(edit.preprocess_image(grey, 4), means / 127.5 - 1, atol=1e-5)
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = (0, 0, 0, 255)
    np.testing.assert_allclose(edit.preprocess_image(clear, 4)[:, 0, 0], [-1, -1, 1, 1])
    wide = np.zeros((2, 8, 3), np.uint8)
    assert edit.preprocess_image(wide, 8)[:, 0, 0].tolist() == [1, 1, 1, -1, -1, 1, 1, 1]
    np.testing.assert_array_equal(
        edit.preprocess_image(grey, 16)[::2, 1::2], edit.preprocess_image(grey, 8)
    )


def test_a_pixel_changes_if_any_it_stands_for_does():
    mask = np.zeros((8, 8, 1), np.float32)
    mask[3, 5] = 0.1
    found = edit.preprocess_mask(mask, 4)[..., 0]
    assert found.sum() == 1 and found[1, 2] == 1
    clear = np.full((2, 8, 4), 255, np.uint8)
    clear[:, 6:, 3] = 0
    mask = edit.alpha_mask(clear)
    assert mask[0, :, 0].tolist() == [0] * 6 + [1, 1]
    assert np.argwhere(edit.preprocess_mask(mask, 4)[..., 0]).tolist() == [[1, 3], [2, 3]]


@pytest.mark.parametrize("shape", [(8, 8, 3), (30, 50, 4), (51, 20, 3), (200, 200, 4)])
def test_what_is_not_to_change_is_identical(tiny, shape):
    """At the original's size, whatever that is; every value, transparency too."""
    original = RANDOM.integers(0, 256, shape, np.uint8)
    mask = np.zeros((*shape[:2], 1), np.float32)
    mask[shape[0] // 3 : shape[0] // 2, shape[1] // 4 :] = 1
    mask[-1, -1] = 0.5
    drawn = tiny.postprocess(
        last(
            tiny,
            ["a cat"],
            SamplerOptions(steps=2),
            pictures=edit.preprocess_image(original, 8)[None],
            masks=edit.preprocess_mask(mask, 8)[None],
        )
    )[0]
    found = edit.paste(original, drawn, mask)
    assert found.shape == original.shape and found.dtype == np.uint8
    kept = (mask == 0)[..., 0]
    np.testing.assert_array_equal(found[kept], original[kept])
    assert (found[~kept][:, :3] != original[~kept][:, :3]).mean() > 0.9
    if shape[2] == 4:
        assert (found[mask[..., 0] == 1][:, 3] == 255).all()


def test_pasting_puts_things_where_fitting_saw_them():
    original = np.full((40, 100, 3), 255, np.uint8)
    original[10:20, 70:80] = 0
    seen = pipeline.to_uint8(edit.preprocess_image(original, 50))
    found = edit.paste(original, seen, np.ones((40, 100, 1)))
    assert (found[11:19, 71:79] < 40).all() and (found[:8] > 215).all()
    assert np.abs(found.astype(int) - original).mean() < 2


def file_of(array, format, **options):
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, format, **options)
    return file.getvalue()


PIXELS = RANDOM.integers(0, 256, (5, 7, 4), np.uint8)
SMOOTH = np.linspace(60, 200, 5 * 7 * 3).reshape(5, 7, 3).astype(np.uint8)


def test_files_are_read_by_what_they_are():
    np.testing.assert_array_equal(image_io.decode(file_of(PIXELS, "PNG")), PIXELS)
    lossless = image_io.decode(file_of(PIXELS, "WEBP", lossless=True, exact=True))
    np.testing.assert_array_equal(lossless, PIXELS)
    for format in ("JPEG", "WEBP", "GIF"):
        found = image_io.decode(file_of(SMOOTH, format))
        assert found.shape == (5, 7, 4) and (found[..., 3] == 255).all()
        np.testing.assert_allclose(found[..., :3].astype(int), SMOOTH, atol=40)
    deep = np.linspace(0, 65535, 12).reshape(3, 4).astype(np.uint16)
    assert image_io.decode(file_of(deep, "PNG"))[..., 0].tolist() == (deep >> 8).tolist()
    for mode in ("1", "L", "LA", "P", "CMYK"):
        format = "JPEG" if mode == "CMYK" else "PNG"
        found = image_io.decode(file_of(Image.fromarray(SMOOTH).convert(mode), format))
        assert found.shape == (5, 7, 4) and found.dtype == np.uint8


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        data = file_of(frames[0], format, save_all=True, append_images=frames[1:])
        found = image_io.decode(data)
        assert found.shape == (3, 4, 4) and found[0, 0, 0] > 240 and found[0, 0, 2] < 20


def test_a_photograph_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned a quarter to the right
    found = image_io.decode(file_of(SMOOTH, "PNG", exif=exif))
    np.testing.assert_array_equal(found[..., :3], np.rot90(SMOOTH, -1))


def png(width, height):
    """The header of a PNG of any size, with next to nothing behind it."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def test_what_is_no_picture_or_too_large_is_refused():
    formats = naming("PNG", "JPEG", "WebP", "GIF")  # that can be read
    for data, words in (
        (b"", formats),
        (b"%PDF-1.7 something", formats),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", formats),
        (file_of(SMOOTH, "BMP"), formats),
        (file_of(SMOOTH, "TIFF"), formats),
        (png(60_000, 60_000), naming(60_000 * 60_000)),
        (png(5_000, 5_000), naming("5000 x 5000")),
        (png(100_000, 1), naming("100000 x 1")),
        (png(100, 100), r"\A(?!.*(WebP|100 x 100))"),  # neither the format nor the size is wrong
    ):
        with pytest.raises(ValueError, match=words):
            image_io.decode(data)
    with pytest.raises(ValueError, match=naming("7 x 5", 34)):
        image_io.decode(file_of(PIXELS, "PNG"), max_pixels=34)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_files_cut_off_are_refused(format):
    noise = RANDOM.integers(0, 256, (40, 40, 3), np.uint8)
    data = file_of(noise, format)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ValueError):
            image_io.decode(data[: int(share * len(data))])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_files_raise_nothing_but_value_errors(format):
    data = file_of(RANDOM.integers(0, 256, (9, 9, 3), np.uint8), format)
    for _ in range(200):
        hurt = bytearray(data)
        for place in RANDOM.integers(0, len(data), 3):
            hurt[place] = RANDOM.integers(0, 256)
        with contextlib.suppress(ValueError):
            assert image_io.decode(bytes(hurt), max_pixels=10_000).dtype == np.uint8


def test_what_is_written_can_be_read():
    np.testing.assert_array_equal(image_io.decode(image_io.encode(PIXELS, "png")), PIXELS)
    for format in image_io.FORMATS:
        found = image_io.decode(image_io.encode(SMOOTH, format))
        np.testing.assert_allclose(found[..., :3].astype(int), SMOOTH, atol=8)
    clear = np.zeros((8, 8, 4), np.uint8)
    assert (image_io.decode(image_io.encode(clear, "jpeg"))[..., :3] > 250).all()
    assert (image_io.decode(image_io.encode(clear, "webp"))[..., 3] == 0).all()
    for wrong in (SMOOTH.astype(np.float32), SMOOTH[0], SMOOTH[..., :2]):
        with pytest.raises(ValueError, match=naming("image", "uint8", list(wrong.shape))):
            image_io.encode(wrong, "png")
    with pytest.raises(ValueError, match=naming("format", *image_io.FORMATS, "'gif'")):
        image_io.encode(SMOOTH, "gif")


def test_a_file_is_of_the_kind_its_name_says(tmp_path):
    for name, start in {"a.png": b"\x89PNG", "a.JPG": b"\xff\xd8", "a.webp": b"RIFF"}.items():
        image_io.save(SMOOTH, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match=naming(tmp_path / "a.tiff", ".png", ".jpg", ".webp")):
        image_io.save(SMOOTH, tmp_path / "a.tiff")


def test_asking_where_the_weights_are_needs_no_jax(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("nothing-64")):
        diffusion.weights_folder("nothing-64")
    code = (
        "import sys, diffusion; diffusion.weights_folder; "
        "assert 'jax' not in sys.modules; diffusion.load"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
