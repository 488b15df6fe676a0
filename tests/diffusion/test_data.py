"""Training data of emoji-64: selection of emoji, captions and images."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.text import PromptEmbeds

ENTRIES = [
    {"label": "red apple", "hexcode": "1F34E", "group": 4, "tags": ["apple", "food", "fruit"]},
    {"label": "green apple", "hexcode": "1F34F", "group": 4, "tags": ["apple", "food", "fruit"]},
    {"label": "cat", "hexcode": "1F408", "group": 3, "tags": ["pet"]},
    {"label": "red heart", "hexcode": "2764", "group": 0, "tags": ["heart", "love"]},
    {"label": "man cook", "hexcode": "1F468-200D-1F373", "group": 1, "tags": ["cook"]},
    {"label": "flag: Malta", "hexcode": "1F1F2-1F1F9", "group": 9, "tags": []},
    {"label": "one o’clock", "hexcode": "1F550", "group": 5, "tags": ["clock"]},
    {"label": "right arrow", "hexcode": "27A1", "group": 8, "tags": ["arrow"]},
]
SHORTCODES = {"1F34E": "apple", "1F408": ["cat2"], "2764": "heart", "27A1": "arrow_right"}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write npm packages with a few emoji to a folder; return the folder."""
    image_file = io.BytesIO()
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (200, 0, 0, 255)
    Image.fromarray(rgba).save(image_file, "PNG")

    def write(package, files):
        with tarfile.open(tmp_path / package.file, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    write(
        data.NAMES_PACKAGE,
        {
            "package/en/data.json": json.dumps(ENTRIES).encode(),
            "package/en/shortcodes/iamcal.json": json.dumps(SHORTCODES).encode(),
        },
    )
    styles = tuple(replace(style, suffix=".png") for style in data.STYLES)
    monkeypatch.setattr(data, "STYLES", styles)
    for style in styles:
        codes = ["1f34e", "1f408", "2764-fe0f", "1f1f2-1f1f9", "1f34f"]
        if style is styles[2]:
            codes.remove("1f34f")
        write(style.package, {f"{style.folder}{code}.png": image_file.getvalue() for code in codes})
    return tmp_path


def test_emoji_variants_flags_and_clocks_are_excluded(packages):
    names = [concept.name for concept in data.load_concepts(packages)]
    assert names == ["red apple", "green apple", "cat", "red heart", "right arrow"]


def test_emoji_captions_are_names_shortcodes_and_distinctive_keywords(packages):
    apple, _, cat, heart, arrow = data.load_concepts(packages)
    assert list(apple.captions)[:3] == ["red apple", "a red apple", "apple"]
    assert sum(apple.captions.values()) == pytest.approx(1)
    assert apple.captions["apple"] > apple.captions["food"]
    assert (apple.plain, cat.plain, heart.plain, arrow.plain) == ("apple", "cat", "heart", None)
    assert arrow.directed and not cat.directed
    assert arrow.weight < cat.weight


def test_images_with_and_without_variation_selector_are_loaded(packages):
    concepts = data.load_concepts(packages)
    images = data.load_images(packages, data.STYLES[0], concepts)
    assert sorted(images) == ["1f34e", "1f34f", "1f408", "2764"]
    assert images["2764"].shape == (64, 64, 3) and images["2764"].dtype == np.uint8


def test_colour_of_transparent_pixels_does_not_bleed():
    """Resizing without premultiplied alpha would mix transparent green pixels into the red ones."""
    rgba = np.zeros((128, 128, 4), np.uint8)
    rgba[:, :64] = (255, 0, 0, 255)
    rgba[:, 64:] = (0, 255, 0, 0)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    pixels = data.on_white(file.getvalue(), 64).astype(int)
    assert (pixels[:, :28] == (255, 0, 0)).all() and (pixels[:, 36:] == 255).all()
    assert (np.abs(pixels[..., 1] - pixels[..., 2]) <= 1).all()  # green equals blue


def test_dataset_has_every_image_and_caption(packages, tmp_path):
    captions = []

    def encode(texts):
        captions.extend(texts)
        count = len(texts)
        states = np.arange(count, dtype=np.float32)[:, None, None] * np.ones((1, 4, 6), np.float32)
        return PromptEmbeds(states, np.ones((count, 4), bool), states[:, 0])

    data.build_dataset(packages, encode, tmp_path / "pack")
    dataset = data.EmojiDataset(tmp_path / "pack")
    assert len(dataset.images) == 4 + 4 + 3 and len(captions) == len(set(captions))
    assert dataset.held_out.tolist() == [
        data.is_held_out(dataset.concepts[c], data.STYLES[s])
        for c, s in zip(dataset.concept_ids, dataset.style_ids, strict=True)
    ]
    assert [concept.captions for concept in dataset.concepts] == [
        concept.captions for concept in data.load_concepts(packages)
    ]
    small = dataset.downscaled_images(np.array([0, 1]), 32)
    assert small.shape == (2, 32, 32, 3)
    assert small.min() >= -1 and small[0, -1, 0].tolist() == [1, 1, 1]
    embeds = dataset.caption_embeds(["red apple", "red apple, flat style"])
    assert embeds["states"][:, 0, 0].tolist() == [
        captions.index("red apple"),
        captions.index("red apple, flat style"),
    ]
    random = np.random.default_rng(0)
    sampled = {dataset.sample_caption(random, 0) for _ in range(200)}
    name = dataset.concepts[dataset.concept_ids[0]].name
    assert {name, f"{name}, shaded style"} <= sampled
    assert not any("flat" in caption for caption in sampled)


def test_npm_package_with_wrong_hash_is_refused(packages):
    with pytest.raises(ValueError, match=r"sha256.*\bd01d0e2c"):
        data.fetch(packages)


def test_share_of_held_out_images_is_about_one_in_thirty():
    concept = data.Concept("", "", None, {}, 3, 1.0, False)
    codes = [replace(concept, code=f"{n:x}") for n in range(2000)]
    share = np.mean([data.is_held_out(c, s) for c in codes for s in data.STYLES])
    assert 0.02 < share < 0.045
