"""The recipe of emoji-64, the CLIP judge and the metrics, on datasets of coloured squares."""

import hashlib
import io
import json
import tarfile
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion import checkpoint, data, layers, upscale
from diffusion.config import UNetConfig, UpscalerConfig
from diffusion.data import Concept, EmojiDataset
from tests.diffusion.conftest import image_size, random_params
from training.recipes import clip_judge, emoji, emoji_measures

pytestmark = pytest.mark.heavy


def write_dataset(folder, *, count=6, held_out=0.0, seed=0):
    """Write a dataset of images with a black left half, one colour per concept.

    Every second concept is `directed`: its images must not be mirrored.
    """
    random = np.random.default_rng(seed)
    concepts = [
        Concept(
            f"{n:x}", f"thing {n}", None, {f"thing {n}": 0.75, f"a {n}": 0.25}, 3, 1.0, n % 2 == 0
        )
        for n in range(count)
    ]
    texts = [
        data.styled_caption(caption, style)
        for concept in concepts
        for caption in concept.captions
        for style in (None, 0, 1, 2)
    ]
    rows = [(c, s, random.random() < held_out) for c in range(count) for s in range(3)]
    images = np.zeros((len(rows), 64, 64, 3), np.uint8)
    images[:, :, 32:] = random.integers(60, 250, (count, 1, 1, 3), np.uint8).repeat(3, 0)
    pooled = random.normal(size=(len(texts), clip_judge.TEXT_EMBED_DIM)).astype(np.float32)
    folder.mkdir()
    np.savez(
        folder / "pictures.npz",
        images=images,
        rows=np.array(rows),
        mask=np.ones((len(texts), 4), bool),
        pooled=pooled / np.linalg.norm(pooled, axis=-1, keepdims=True),
    )
    np.save(folder / "states.npy", pooled[:, None].repeat(4, 1))
    names = {"concepts": [asdict(concept) for concept in concepts], "texts": texts}
    (folder / "names.json").write_text(json.dumps(names))
    return EmojiDataset(folder)


def test_mirror_leaves_directed_images_unchanged(tmp_path):
    pack = write_dataset(tmp_path / "pack")
    shares = np.full(len(pack.images), 1 / len(pack.images))
    settings = emoji.EmojiConfig(dataset=tmp_path, out=tmp_path, batch_size=200, mirror=True)
    found = emoji.make_batches(pack, settings, shares, 32)(0)
    plain = emoji.make_batches(pack, replace(settings, mirror=False), shares, 32)(0)
    mirrored = (found["x"] != plain["x"]).any((1, 2, 3))
    np.testing.assert_array_equal(found["x"][mirrored], plain["x"][mirrored, :, ::-1])
    colours = pack.downscaled_images(np.arange(len(pack.images)), 32)[:, 0, -1]
    picture = (plain["x"][:, None, 0, -1] == colours).all(-1).argmax(1)
    directed = pack.concept_ids[picture] % 2 == 0
    assert 60 < directed.sum() < 140 and not mirrored[directed].any()
    assert 0.3 < mirrored[~directed].mean() < 0.7
    for name in ("states", "keep"):  # mirroring must not change other random numbers
        np.testing.assert_array_equal(found[name], plain[name])


def test_augment_varies_images_and_keeps_white():
    images = np.full((60, 64, 64, 3), 255, np.uint8)
    images[:, 16:48, 16:32] = (200, 30, 30)
    random = np.random.default_rng(0)
    x = clip_judge.augment(random, images, np.arange(60) < 30)
    assert x.shape == (60, 32, 32, 3) and x.dtype == np.float32 and np.abs(x).max() <= 1
    ink = (1 - x).mean((1, 3))  # [60, X]
    is_right = ink[:, 16:].sum(1) > ink[:, :16].sum(1)
    assert not is_right[30:].any() and 5 < is_right[:30].sum() < 25
    assert np.median(x[:, 0, 0]) > 0.9  # white stays white
    reds = (x[:, 8:24, 8:24, 0] - x[:, 8:24, 8:24, 1]).mean((1, 2))
    assert (reds > 0.1).mean() > 0.9 and reds.std() > 0.1
    greys = np.full((4, 3), 0.5) @ clip_judge._color_matrices(random, 4)
    np.testing.assert_allclose(greys, greys[..., :1].repeat(3, -1))


def test_blur_keeps_constant_images_and_the_sum_of_pixels():
    x = np.zeros((1, 5, 5, 1))
    x[0, 2, 2] = 16
    assert clip_judge._blur(x)[0, 1:4, 1:4, 0].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    np.testing.assert_allclose(clip_judge._blur(np.full((1, 3, 4, 2), 0.3)), 0.3)


def test_openmoji_svg_is_rendered_without_its_margin():
    pytest.importorskip("resvg_py", reason="renders SVG; only the training of the judge needs it")
    svg = b'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
    svg += b'<rect x="6" y="6" width="60" height="60" fill="#ff0000"/></svg>'
    found = clip_judge.svg_on_white(svg, 64).astype(int)
    assert found.shape == (64, 64, 3)
    assert (np.abs(found[1:-1, 1:-1] - (255, 0, 0)) <= 1).all()


def test_judge_loss_samples_captions_by_their_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_judge, "CHANNELS", (8, 8))
    pack = write_dataset(tmp_path / "pack")
    captions = clip_judge.caption_embeddings(pack)
    assert captions.pooled.shape == (6, 2, clip_judge.TEXT_EMBED_DIM)
    np.testing.assert_array_equal(captions.pooled[1, 1], pack.pooled[pack.caption_rows["a 1"]])
    np.testing.assert_allclose(captions.shares, [[0.75, 0.25]] * 6)

    task, rows = clip_judge.ContrastiveTask(), np.array([0, 3, 4])
    weights = task.init(jax.random.key(0))
    batch = {
        "x": pack.downscaled_images(rows, clip_judge.IMAGE_SIZE),
        "concept": pack.concept_ids[rows],
    }
    only_names = captions.replace(shares=jnp.array([[1.0, 0.0]] * 6))
    loss, weight, counts = task.loss(weights, only_names, batch, jax.random.key(1))
    names = captions.pooled[:, 0]
    logits = np.asarray(
        clip_judge.logits_per_image(weights, clip_judge.image_features(weights, batch["x"]), names)
    )
    assert np.abs(logits).max() <= np.exp(weights.sharpness)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(chances[np.arange(3), batch["concept"]]).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == 3 and counts["correct"] == (logits.argmax(1) == batch["concept"]).sum()


def test_labelled_grid_shows_each_image_beside_its_label():
    pictures = np.random.default_rng(0).integers(0, 200, (3, 2, 16, 16, 3), np.uint8)
    found = emoji_measures.labelled_grid(pictures, ["cat", "dog", "house"])
    windows = np.lib.stride_tricks.sliding_window_view(found, (16, 16), (0, 1))
    for row, four in enumerate(pictures):
        left = found.shape[1] // 2 * (row // 2)
        corners = []
        for picture in four:
            same = (windows == picture.transpose(2, 0, 1)).all((2, 3, 4))
            (corner,) = np.argwhere(same).tolist()
            corners.append(corner)
        top, start = corners[0]
        assert top == 4 + 20 * (row % 2) and corners[1] == [top, start + 20]
        assert (found[top : top + 16, left : start - 4] < 100).any()  # the label


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write packages of two vendors with images of the concepts of a dataset."""
    folder, vendors = tmp_path / "npm", []
    folder.mkdir()
    for style, _ in clip_judge.VENDORS:
        path = folder / style.package.file
        with tarfile.open(path, "w:gz") as archive:
            for n in range(6):
                file = io.BytesIO()
                Image.new("RGB", (64, 64), (40 * n, 250 - 40 * n, 99)).save(file, "PNG")
                member = tarfile.TarInfo(f"{style.folder}{n:X}.png")
                member.size = file.tell()
                archive.addfile(member, io.BytesIO(file.getvalue()))
        package = replace(style.package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        vendors.append((replace(style, package=package, suffix=".png"), data.on_white))
    monkeypatch.setattr(clip_judge, "VENDORS", tuple(vendors))
    return folder


@pytest.mark.slow
def test_judge_trains_and_resumes(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_judge, "CHANNELS", (8, 8))
    monkeypatch.setattr(clip_judge, "VALIDATION_BATCH_SIZE", 3)
    write_dataset(tmp_path / "pack")
    args = ["--packages", str(packages), "--dataset", str(tmp_path / "pack"), "--batch-size", "8"]
    for _ in range(2):  # the second run is complete already
        assert clip_judge.main([*args, "--steps", "150", "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 151))
    assert np.mean([line["accuracy"] for line in lines[-20:] if "accuracy" in line]) > 0.6
    assert "valid_accuracy" in lines[-1]
    weights = emoji.load_ema_weights(tmp_path / "run", clip_judge.ContrastiveTask())
    assert clip_judge.image_features(weights, jnp.zeros((2, 32, 32, 3))).shape == (2, 8)


@pytest.mark.slow
def test_emoji_measures_and_image_grids_are_written(tmp_path, monkeypatch, model_file):
    monkeypatch.setattr(clip_judge, "CHANNELS", (8, 8))
    monkeypatch.setattr(emoji_measures, "SAMPLE_PROMPTS", ("cat", "dog"))
    pack = write_dataset(tmp_path / "pack", count=110, held_out=0.2)
    cfg, twice = (
        UNetConfig.debug(image_size=32, text_dim=384),
        UpscalerConfig(width=8, num_blocks=1),
    )
    checkpoint.save(tmp_path / "model" / "denoiser", random_params(cfg), cfg)
    weights = layers.init(jax.random.key(0), upscale.abstract(twice))
    checkpoint.save(tmp_path / "model" / "upscaler", weights, twice)
    judge = clip_judge.ContrastiveTask().init(jax.random.key(0))
    monkeypatch.setattr(emoji_measures, "load_ema_weights", lambda run, task: judge)
    args = ["--model", str(tmp_path / "model"), "--encoder", str(model_file("all-minilm-l6-v2"))]
    args += ["--out", str(tmp_path / "out")]
    more = ["--dataset", str(tmp_path / "pack"), "--judge", str(tmp_path)]
    assert emoji_measures.main(["numbers", *args, *more]) == 0
    found = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert found["pictures"]["held_out"] == pack.held_out.sum()
    assert found["style"]["real"] == pytest.approx(1 / 3, abs=0.2)  # all styles look the same
    assert abs(found["kernel_distance"]["real"]) < found["kernel_distance"]["drawn"]
    assert found["coverage"]["real"] > found["coverage"]["drawn"]
    assert found["flow_loss"]["held_out"].keys() == found["flow_loss"]["learnt"].keys()
    assert found["memorisation"]["learnt"] > 0
    for name in ("samples.png", "flow_loss.png"):
        assert image_size(tmp_path / "out" / name)[0] > 100
    assert emoji_measures.main(["sheet", *args]) == 0
    sizes = [image_size(tmp_path / "out" / f"{n}.png") for n in ("grid", "grid-numbered")]
    assert sizes[0][1] == sizes[1][1] and sizes[0][0] > sizes[1][0]
