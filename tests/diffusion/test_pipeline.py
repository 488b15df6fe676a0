"""The pipeline with the real text encoder and a tiny network, and the training recipe."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion
from diffusion import __main__ as command
from diffusion import data, layers, model, pipeline, sample, upscale
from diffusion.pipeline import SamplerOptions
from diffusion.text import MAX_TOKENS, TextEncoder
from tests.diffusion.conftest import CFG, UPSCALER, image_size, random_params
from tests.naming import naming
from training.recipes import emoji


def test_text_encoder_pads_batches_and_truncates_prompts(encoder):
    encode = TextEncoder(encoder)
    text = encode(["a red apple", "an automobile", "a car"])
    assert text.states.shape == (3, MAX_TOKENS, 384) and text.mask.sum(1).tolist() == [5, 4, 4]
    np.testing.assert_allclose(np.linalg.norm(text.pooled, axis=-1), 1, rtol=1e-5)
    assert text.pooled[1] @ text.pooled[2] > text.pooled[0] @ text.pooled[1] + 0.2
    alone = encode(["a car"])
    np.testing.assert_allclose(alone.pooled[0], text.pooled[2], atol=1e-5)
    many = encode(["a car"] * 70 + ["an automobile"])
    np.testing.assert_allclose(many.pooled[-1], text.pooled[1], atol=1e-5)
    long = encode(["word " * 100])
    assert long.mask.all()


def test_images_depend_on_prompt_seed_and_index(folder, encoder):
    pipe = diffusion.load(folder, encoder)
    options = SamplerOptions(steps=3)
    images = pipe.generate(["a cat", "a cat", "a dog"], seed=1, options=options)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8 and pipe.size == 16
    np.testing.assert_array_equal(pipe.generate(["a cat"], seed=1, options=options), images[:1])
    assert (images[0] != images[1]).any()
    assert (pipe.generate(["a dog"], seed=1, options=options) != images[:1]).any()
    assert (pipe.generate(["a cat"], seed=2, options=options) != images[:1]).any()
    stronger = SamplerOptions(steps=3, guidance=9.0)
    assert (pipe.generate(["a cat"], seed=1, options=stronger) != images[:1]).any()


def test_every_step_can_be_postprocessed(folder, encoder):
    pipe = diffusion.load(folder, encoder)
    options = SamplerOptions(steps=4, sampler="heun", guidance=2.0)
    steps = list(pipe.steps(["a cat"], sample.image_keys(0, 1), options))
    assert len(steps) == 4
    images = [pipe.postprocess(clean) for _, clean in steps]
    assert all(image.shape == (1, 16, 16, 3) for image in images)
    np.testing.assert_array_equal(
        pipe.postprocess(steps[-1][0]), pipe.generate(["a cat"], seed=0, options=options)
    )


def test_guidance_of_one_equals_the_conditional_prediction(folder, encoder):
    pipe = diffusion.load(folder, encoder)
    text = jax.tree.map(jnp.asarray, pipe.text_encoder(["a cat"]))
    z, t = sample.normal(sample.image_keys(0, 1), (8, 8, 3)), jnp.full(1, 0.4)
    args = (pipe.denoiser, pipe.cfg, z)
    conditional = model.denoise(*args, t, text, jnp.array([True]))
    np.testing.assert_allclose(
        pipeline.denoise_with_guidance(*args, 0.4, text, 1.0), conditional, atol=1e-5
    )
    unconditional = model.denoise(*args, t, text, jnp.array([False]))
    np.testing.assert_allclose(
        pipeline.denoise_with_guidance(*args, 0.4, text, 3.0),
        unconditional + 3 * (conditional - unconditional),
        atol=1e-4,
    )


def test_empty_prompt_equals_no_prompt(tiny):
    z, t = sample.normal(sample.image_keys(0, 2), (8, 8, 3)), jnp.full(2, 0.4)
    text = tiny.encode_prompts([" ", "a cat"])
    assert text.mask.any(1).tolist() == [False, True]
    arguments = (tiny.denoiser, tiny.cfg, z)
    unconditional = model.denoise(*arguments, t, text, jnp.zeros(2, bool))
    predicted = pipeline.denoise_with_guidance(*arguments, 0.4, text, 3.0)
    np.testing.assert_allclose(predicted[0], unconditional[0], atol=1e-5)
    assert np.abs(predicted[1] - unconditional[1]).max() > 1e-3


def test_error_names_invalid_sampler_options():
    for field, value in {"steps": 0, "sampler": "plms", "guidance": -1.0, "shift": 100.0}.items():
        with pytest.raises(ValueError, match=naming(field, repr(value))):
            SamplerOptions(**{field: value})


def test_initial_upscaler_doubles_every_pixel():
    weights = layers.init(jax.random.key(0), upscale.abstract(UPSCALER))
    x = jax.random.uniform(jax.random.key(1), (2, 6, 4, 3))
    upscaled = upscale.upscale_2x(weights, UPSCALER, x)
    np.testing.assert_array_equal(upscaled, np.repeat(np.repeat(x, 2, 1), 2, 2))
    assert upscale.resize(pipeline.to_uint8(x)[0], 32).shape == (32, 32, 3)


def test_make_grid_keeps_images_whole():
    images = np.arange(3 * 2 * 2 * 1, dtype=np.uint8).reshape(3, 2, 2, 1)
    grid = pipeline.make_grid(images, 2)
    assert grid[..., 0].tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 255, 255], [10, 11, 255, 255],
    ]  # fmt: skip


def test_command_writes_an_image(folder, encoder, tmp_path, capsys):
    out = tmp_path / "cats.png"
    arguments = [
        "--model",
        str(folder),
        "--encoder",
        str(encoder),
        "--steps",
        "3",
        "--out",
        str(out),
    ]
    assert command.main([*arguments, "-n", "2", "a cat", "a dog"]) == 0
    assert image_size(out) == (32, 32)
    assert command.main([*arguments, "--strip", "a cat"]) == 0
    assert image_size(out) == (48, 32)
    assert command.main([*arguments[2:], "--model", str(tmp_path), "a cat"]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.fixture
def pack(tmp_path, encoder):
    """Write a dataset of random images, with captions encoded by the real text encoder."""
    random = np.random.default_rng(0)
    concepts = [
        data.Concept(f"{n:x}", name, name, {name: 0.7, f"a {name}": 0.3}, 3, 1.0, False)
        for n, name in enumerate(("cat", "dog"))
    ]
    texts = [
        data.styled_caption(caption, style)
        for concept in concepts
        for caption in concept.captions
        for style in (None, 0, 1, 2)
    ]
    text = TextEncoder(encoder)(texts)
    rows = [(c, s, False) for c in range(2) for s in range(3)] * 8
    rows += [(0, 1, True)] * emoji.VALIDATION_BATCH_SIZE
    folder = tmp_path / "pack"
    folder.mkdir()
    images = random.integers(0, 256, (len(rows), 64, 64, 3), np.uint8)
    pictures = {"images": images, "rows": np.array(rows)}
    np.savez(folder / "pictures.npz", **pictures, mask=text.mask, pooled=text.pooled)
    np.save(folder / "states.npy", text.states)
    names = {"concepts": [vars(concept) for concept in concepts], "texts": texts}
    (folder / "names.json").write_text(json.dumps(names))
    return folder


@pytest.mark.slow
def test_emoji_recipe_trains_and_exports_a_model(pack, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "UNET", CFG)
    monkeypatch.setattr(emoji, "UPSCALER", UPSCALER)
    monkeypatch.setattr(emoji, "SAMPLE_PROMPTS", ("cat", "dog"))
    run, upscaler_run, exported = tmp_path / "run", tmp_path / "twice", tmp_path / "model"
    arguments = ["--pack", str(pack), "--batch-size", "4", "--steps", "3"]
    assert emoji.main(["denoiser", *arguments, "--encoder", str(encoder), "--out", str(run)]) == 0
    assert image_size(run / "grid-000003.png") == (80, 8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and "valid_loss" in lines[-1]
    assert emoji.main(["upscaler", *arguments, "--out", str(upscaler_run)]) == 0
    for folder, name in ((run, "denoiser"), (upscaler_run, "upscaler")):
        assert emoji.main(["export", "--run", str(folder), "--out", str(exported / name)]) == 0
    pipe = diffusion.load(exported, encoder)
    assert pipe.generate(["cat"], options=SamplerOptions(steps=2)).shape == (1, 16, 16, 3)


def test_denoising_task_with_init_params_starts_from_them(tmp_path):
    start = random_params(CFG)
    initial = emoji.DenoisingTask(CFG, init_params=start).init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, initial, start)


def test_held_out_images_are_never_sampled_and_common_names_more_often(pack):
    dataset = data.EmojiDataset(pack)
    settings = emoji.EmojiConfig(dataset=pack, out=pack)
    shares = emoji.sampling_shares(dataset, settings, frozenset({"cat"}))
    assert shares[dataset.held_out].tolist() == [0] * emoji.VALIDATION_BATCH_SIZE
    np.testing.assert_allclose(shares[:3], shares[3:6] * settings.common_weight)
    np.testing.assert_allclose(
        shares[1] / shares[0], settings.style_shares[1] / settings.style_shares[0]
    )
    batch = emoji.make_batches(dataset, settings, shares, 32)
    again = emoji.make_batches(dataset, settings, shares, 32)
    for name, array in batch(5).items():
        np.testing.assert_array_equal(array, again(5)[name])
    assert (batch(5)["x"] != batch(6)["x"]).any()
