"""Variations and inpainting with a tiny network and the real text encoder; image files."""

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
OPTIONS = SamplerOptions(steps=6, sampler="ddim")


def edit_images(pipe, prompts, options=OPTIONS, *, seed=0, images, **kw):
    """Return the result of an edit, float32."""
    keys = sample.image_keys(seed, len(prompts))
    *_, (result, _) = edit.steps(pipe, prompts, keys, options, images=images, **kw)
    return np.asarray(result)


@pytest.fixture(scope="module")
def sources():
    """Return three smooth images of 8 x 8 pixels, float32, -1 to 1."""
    small = RANDOM.uniform(-0.9, 0.9, (3, 2, 2, 3)).astype(np.float32)
    return np.repeat(np.repeat(small, 4, 1), 4, 2)


def test_low_strength_stays_close_and_full_strength_ignores_the_image(tiny, sources):
    image, other = sources[:1], sources[1:2]
    distances = [
        np.abs(edit_images(tiny, ["a cat"], images=image, strength=s) - image).mean()
        for s in (0.02, 0.5, 1.0)
    ]
    assert distances[0] < 0.05 < distances[1] < distances[2]
    fresh = edit_images(tiny, ["a cat"], images=image, strength=1.0)
    np.testing.assert_array_equal(fresh, edit_images(tiny, ["a cat"], images=other, strength=1.0))
    *_, (result, _) = tiny.steps(["a cat"], sample.image_keys(0, 1), OPTIONS)
    np.testing.assert_array_equal(fresh, result)


def test_strength_scales_the_number_of_steps(tiny, sources):
    for strength, count in ((0.01, 1), (0.5, 3), (0.75, 4), (1.0, 6)):
        arguments = dict(images=sources[:1], strength=strength)
        steps = list(edit.steps(tiny, ["a cat"], sample.image_keys(0, 1), OPTIONS, **arguments))
        assert len(steps) == count and steps[0][0].shape == steps[0][1].shape == (1, 8, 8, 3)


def test_variation_depends_on_seed_and_prompt(tiny, sources):
    arguments = dict(images=sources[:1], strength=0.7)
    result = edit_images(tiny, ["a cat"], seed=1, **arguments)
    np.testing.assert_array_equal(edit_images(tiny, ["a cat"], seed=1, **arguments), result)
    assert (edit_images(tiny, ["a cat"], seed=2, **arguments) != result).any()
    assert (edit_images(tiny, ["a dog"], seed=1, **arguments) != result).any()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp"])
def test_inpainted_image_does_not_depend_on_rest_of_batch(tiny, sources, sampler):
    options = SamplerOptions(steps=4, sampler=sampler)
    masks = np.zeros((3, 8, 8, 1), np.float32)
    masks[:, :, 4:] = 1
    prompts = ["a cat", "a dog", "a red apple"]
    result = edit_images(tiny, prompts, options, images=sources, masks=masks, strength=0.8)
    alone = edit_images(
        tiny, prompts[:1], options, images=sources[:1], masks=masks[:1], strength=0.8
    )
    np.testing.assert_allclose(alone, result[:1], atol=1e-5)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_inpainting_keeps_the_noised_original_outside_the_mask(sampler):
    """Replacing the predicted clean image equals RePaint's replacement, for every sampler."""
    original = jnp.asarray(RANDOM.uniform(-1, 1, (1, 4, 4, 3)), jnp.float32)
    mask = jnp.zeros((1, 4, 4, 1)).at[:, 2:].set(1.0)
    e = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    denoise = edit.inpaint_denoiser(dummy, original, mask)
    levels = schedule.flow_levels(6)
    keys = sample.image_keys(0, 1)
    steps = list(sample.steps(denoise, e, levels, sampler, keys=keys))
    for step, level in zip(steps, levels[1:], strict=True):
        if sampler != "ddpm":  # ddpm adds fresh noise
            noised = level.alpha * original + level.sigma * e
            np.testing.assert_allclose(step.noisy[:, :2], noised[:, :2], atol=1e-5)
    np.testing.assert_allclose(steps[-1].noisy[:, :2], original[:, :2], atol=1e-6)
    unmasked = sample.sample(dummy, e, levels, sampler, keys=keys)
    np.testing.assert_allclose(
        steps[-1].noisy[:, 2:], unmasked[:, 2:], atol=1e-6
    )  # `dummy` predicts each pixel from that pixel only


def test_inpainted_part_depends_on_the_image_outside_the_mask(tiny, sources):
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, 2:6, 2:6] = 1
    result = [edit_images(tiny, ["a cat"], images=sources[i : i + 1], masks=mask) for i in (0, 1)]
    for i in (0, 1):
        difference = np.abs(result[i] - sources[i])[mask[..., 0] == 0]
        np.testing.assert_allclose(difference, 0, atol=1e-5)
    assert np.abs(result[0] - result[1])[mask[..., 0] == 1].max() > 1e-3


def test_renoised_image_has_mean_and_deviation_of_its_noise_level():
    level, noisier_level = schedule.from_flow(0.6), schedule.from_flow(0.3)
    x = jnp.linspace(-1, 1, 8)
    e, fresh = RANDOM.standard_normal((2, 50_000, 8)).astype(np.float32)
    noisy = edit.renoise(level.alpha * x + level.sigma * e, level, noisier_level, fresh)
    np.testing.assert_allclose(noisy.mean(0), noisier_level.alpha * x, atol=0.02)
    np.testing.assert_allclose(noisy.std(0), noisier_level.sigma, atol=0.01)


def test_edit_with_invalid_argument_raises_and_names_it(tiny, sources):
    keys = sample.image_keys(0, 1)
    for arguments, facts in (
        (dict(images=sources[:1], strength=0.0), ["strength", 0.0]),
        (dict(images=sources[:1], strength=1.5), ["strength", 1.5]),
        (dict(images=sources[:2]), ["images", [1, 8, 8, 3], [2, 8, 8, 3]]),
        (dict(images=sources[:1], masks=sources[:1]), ["masks", [1, 8, 8, 1], [1, 8, 8, 3]]),
    ):
        with pytest.raises(ValueError, match=naming(*facts)):
            next(edit.steps(tiny, ["a cat"], keys, OPTIONS, **arguments))


def test_preprocess_image_averages_areas_on_white():
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


def test_preprocess_mask_marks_areas_with_any_masked_pixel():
    mask = np.zeros((8, 8, 1), np.float32)
    mask[3, 5] = 0.1
    resized = edit.preprocess_mask(mask, 4)[..., 0]
    assert resized.sum() == 1 and resized[1, 2] == 1
    clear = np.full((2, 8, 4), 255, np.uint8)
    clear[:, 6:, 3] = 0
    mask = edit.alpha_mask(clear)
    assert mask[0, :, 0].tolist() == [0] * 6 + [1, 1]
    assert np.argwhere(edit.preprocess_mask(mask, 4)[..., 0]).tolist() == [[1, 3], [2, 3]]


@pytest.mark.parametrize("shape", [(8, 8, 3), (30, 50, 4), (51, 20, 3), (200, 200, 4)])
def test_pasted_image_is_identical_outside_the_mask(tiny, shape):
    """The result has the size of the original; outside the mask all channels are equal."""
    original = RANDOM.integers(0, 256, shape, np.uint8)
    mask = np.zeros((*shape[:2], 1), np.float32)
    mask[shape[0] // 3 : shape[0] // 2, shape[1] // 4 :] = 1
    mask[-1, -1] = 0.5
    result = tiny.postprocess(
        edit_images(
            tiny,
            ["a cat"],
            SamplerOptions(steps=2),
            images=edit.preprocess_image(original, 8)[None],
            masks=edit.preprocess_mask(mask, 8)[None],
        )
    )[0]
    pixels = edit.paste(original, result, mask)
    assert pixels.shape == original.shape and pixels.dtype == np.uint8
    is_unmasked = (mask == 0)[..., 0]
    np.testing.assert_array_equal(pixels[is_unmasked], original[is_unmasked])
    assert (pixels[~is_unmasked][:, :3] != original[~is_unmasked][:, :3]).mean() > 0.9
    if shape[2] == 4:
        assert (pixels[mask[..., 0] == 1][:, 3] == 255).all()


def test_paste_inverts_the_placement_of_preprocess_image():
    original = np.full((40, 100, 3), 255, np.uint8)
    original[10:20, 70:80] = 0
    preprocessed = pipeline.to_uint8(edit.preprocess_image(original, 50))
    pixels = edit.paste(original, preprocessed, np.ones((40, 100, 1)))
    assert (pixels[11:19, 71:79] < 40).all() and (pixels[:8] > 215).all()
    assert np.abs(pixels.astype(int) - original).mean() < 2


def file_of(array, format, **options):
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, format, **options)
    return file.getvalue()


PIXELS = RANDOM.integers(0, 256, (5, 7, 4), np.uint8)
SMOOTH = np.linspace(60, 200, 5 * 7 * 3).reshape(5, 7, 3).astype(np.uint8)


def test_files_of_every_format_and_mode_are_decoded():
    np.testing.assert_array_equal(image_io.decode(file_of(PIXELS, "PNG")), PIXELS)
    lossless = image_io.decode(file_of(PIXELS, "WEBP", lossless=True, exact=True))
    np.testing.assert_array_equal(lossless, PIXELS)
    for format in ("JPEG", "WEBP", "GIF"):
        pixels = image_io.decode(file_of(SMOOTH, format))
        assert pixels.shape == (5, 7, 4) and (pixels[..., 3] == 255).all()
        np.testing.assert_allclose(pixels[..., :3].astype(int), SMOOTH, atol=40)
    deep = np.linspace(0, 65535, 12).reshape(3, 4).astype(np.uint16)
    assert image_io.decode(file_of(deep, "PNG"))[..., 0].tolist() == (deep >> 8).tolist()
    for mode in ("1", "L", "LA", "P", "CMYK"):
        format = "JPEG" if mode == "CMYK" else "PNG"
        pixels = image_io.decode(file_of(Image.fromarray(SMOOTH).convert(mode), format))
        assert pixels.shape == (5, 7, 4) and pixels.dtype == np.uint8


def test_animation_is_decoded_to_its_first_frame():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        data = file_of(frames[0], format, save_all=True, append_images=frames[1:])
        pixels = image_io.decode(data)
        assert pixels.shape == (3, 4, 4) and pixels[0, 0, 0] > 240 and pixels[0, 0, 2] < 20


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: rotate by 90 degrees clockwise
    pixels = image_io.decode(file_of(SMOOTH, "PNG", exif=exif))
    np.testing.assert_array_equal(pixels[..., :3], np.rot90(SMOOTH, -1))


def png(width, height):
    """Return a PNG whose header states the given size, with little image data."""

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


def test_unsupported_or_too_large_image_is_refused():
    formats = naming("PNG", "JPEG", "WebP", "GIF")  # the supported formats
    for data, pattern in (
        (b"", formats),
        (b"%PDF-1.7 something", formats),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", formats),
        (file_of(SMOOTH, "BMP"), formats),
        (file_of(SMOOTH, "TIFF"), formats),
        (png(60_000, 60_000), naming(60_000 * 60_000)),
        (png(5_000, 5_000), naming("5000 x 5000")),
        (png(100_000, 1), naming("100000 x 1")),
        (png(100, 100), r"\A(?!.*(WebP|100 x 100))"),  # format and size are valid
    ):
        with pytest.raises(ValueError, match=pattern):
            image_io.decode(data)
    with pytest.raises(ValueError, match=naming("7 x 5", 34)):
        image_io.decode(file_of(PIXELS, "PNG"), max_pixels=34)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_image_files_are_refused(format):
    noise = RANDOM.integers(0, 256, (40, 40, 3), np.uint8)
    data = file_of(noise, format)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ValueError):
            image_io.decode(data[: int(share * len(data))])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_image_files_raise_only_value_errors(format):
    data = file_of(RANDOM.integers(0, 256, (9, 9, 3), np.uint8), format)
    for _ in range(200):
        damaged = bytearray(data)
        for position in RANDOM.integers(0, len(data), 3):
            damaged[position] = RANDOM.integers(0, 256)
        with contextlib.suppress(ValueError):
            assert image_io.decode(bytes(damaged), max_pixels=10_000).dtype == np.uint8


def test_image_round_trips_through_every_format():
    np.testing.assert_array_equal(image_io.decode(image_io.encode(PIXELS, "png")), PIXELS)
    for format in image_io.FORMATS:
        pixels = image_io.decode(image_io.encode(SMOOTH, format))
        np.testing.assert_allclose(pixels[..., :3].astype(int), SMOOTH, atol=8)
    clear = np.zeros((8, 8, 4), np.uint8)
    assert (image_io.decode(image_io.encode(clear, "jpeg"))[..., :3] > 250).all()
    assert (image_io.decode(image_io.encode(clear, "webp"))[..., 3] == 0).all()
    for wrong in (SMOOTH.astype(np.float32), SMOOTH[0], SMOOTH[..., :2]):
        with pytest.raises(ValueError, match=naming("image", "uint8", list(wrong.shape))):
            image_io.encode(wrong, "png")
    with pytest.raises(ValueError, match=naming("format", *image_io.FORMATS, "'gif'")):
        image_io.encode(SMOOTH, "gif")


def test_saved_file_has_the_format_of_its_suffix(tmp_path):
    for name, start in {"a.png": b"\x89PNG", "a.JPG": b"\xff\xd8", "a.webp": b"RIFF"}.items():
        image_io.save(SMOOTH, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match=naming(tmp_path / "a.tiff", ".png", ".jpg", ".webp")):
        image_io.save(SMOOTH, tmp_path / "a.tiff")


def test_weights_folder_does_not_import_jax(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("nothing-64")):
        diffusion.weights_folder("nothing-64")
    code = (
        "import sys, diffusion; diffusion.weights_folder; "
        "assert 'jax' not in sys.modules; diffusion.load"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
