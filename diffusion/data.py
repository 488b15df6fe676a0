"""Training data of emoji-64: emoji of three image sets, with captions and a held-out split.

Images come from packages with pinned hashes: Noto (emoji-datasource-google, Apache-2.0), Twemoji
(emoji-datasource-twitter, CC-BY-4.0) and Fluent in 3D (@lobehub/fluent-emoji-3d, MIT). Names and
keywords come from emojibase-data (MIT). The datasource packages also exist for Apple and Facebook;
those images are not free and are not used. A training example is an image and a caption of its
concept: "red apple", "an apple", "apple, flat style".

Emoji are an unbalanced sample: one in seven is a flag, and people come in five skin tones and three
genders. So flags and variants are excluded, and some groups are sampled less often (`GROUPS`);
otherwise a small model would spend much of its training on them.

One image in thirty is held out: its concept is trained in other styles, but never in this one. The
split depends on a hash of code and style, so it does not change when images are added.

Leaves out: transparency. Images are composited on white.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.text import PromptEmbeds

SIZE = 64  # height and width of the stored images, in pixels


@dataclass(frozen=True)
class Package:
    """An npm package with a pinned hash."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def file(self) -> str:
        """Name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """A set of emoji images in one style: its name in captions, and where its files are."""

    caption: str
    package: Package
    folder: str  # path in the package
    suffix: str


NAMES_PACKAGE = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
)
STYLES = (
    Style(
        "shaded style",
        Package(
            "emoji-datasource-google",
            "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "Apache-2.0",
        ),
        "package/img/google/64/",
        ".png",
    ),
    Style(
        "flat style",
        Package(
            "emoji-datasource-twitter",
            "16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            "CC-BY-4.0",
        ),
        "package/img/twitter/64/",
        ".png",
    ),
    Style(
        "3d style",
        Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT",
        ),
        "package/assets/",
        ".webp",
    ),
)

# Groups of emojibase by number: their name, and the sampling weight of each concept in them.
# Excluded: 2, components (skin tones and hair); 9, flags.
GROUPS = {
    0: ("smileys", 1.0),
    1: ("people", 0.3),
    3: ("nature", 1.0),
    4: ("food", 1.0),
    5: ("travel", 0.8),
    6: ("activities", 0.8),
    7: ("objects", 0.8),
    8: ("symbols", 0.1),
}
_GENDERED = re.compile(r"\b(man|men|woman|women)\b")
_TIME = re.compile(r"o’clock|-thirty")
_SIGN = re.compile(
    r"button|keycap|^(input|Japanese|squared)|arrow|mark\b|symbol for", re.IGNORECASE
)
# Images that must not be mirrored in augmentation: phases of the moon, charts, maps, hands, and
# objects with letters, digits or musical notes.
_DIRECTED = re.compile(
    r"\b(hands?|left|right|moon|globe|map|chart|departure|arrival|clock|watch|stopwatch|calendar|"
    r"medal|banknote|coin|money bag|credit card|newspaper|dvd|dna|musical (note|notes|score)|ZZZ|"
    r"hundred points|stop|hospital|bank|hotel|convenience store|Statue of Liberty|pool 8 ball|"
    r"slot machine|joker|mahjong|cards)\b"
)
_PLAIN_TAG = re.compile(r"[a-z0-9 ]+")


@dataclass(frozen=True)
class Concept:
    """The concept that an emoji shows, whatever its style.

    Attributes:
        code: code points in lower-case hexadecimal, such as "1f34e".
        name: the name, such as "red apple".
        plain: a single word for the concept, such as "apple"; None if there is none. Other
            concepts can have the same word.
        captions: a dict from each caption to its sampling probability; the name is the first key.
        group: the number of its group of emoji, a key of `GROUPS`.
        weight: the sampling weight in training, relative to other concepts.
        directed: whether its images must not be mirrored (letters, hands, arrows, the moon).
    """

    code: str
    name: str
    plain: str | None
    captions: dict[str, float]
    group: int
    weight: float
    directed: bool


def fetch(folder: Path, packages: Sequence[Package] | None = None) -> None:
    """Download packages with npm unless the folder has them, and check all hashes.

    Args:
        folder: the folder of downloaded packages; created if needed.
        packages: the packages; None for all that `build_dataset` needs.

    Raises:
        ValueError: the hash of a package is not the pinned one.
        subprocess.CalledProcessError: npm failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages or (NAMES_PACKAGE, *(style.package for style in STYLES)):
        path = folder / package.file
        if not path.exists():
            command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(
                f"{path}: sha256 must be {package.sha256}, got {digest}; delete the file and retry"
            )


def load_concepts(folder: Path) -> list[Concept]:
    """Return the concepts to train on, in Unicode's order.

    Args:
        folder: holds `NAMES_PACKAGE`, which `fetch` downloads.
    """
    with tarfile.open(folder / NAMES_PACKAGE.file) as archive:
        entries = json.loads(_read_member(archive, "package/en/data.json"))
        shortcodes = json.loads(_read_member(archive, "package/en/shortcodes/iamcal.json"))
    included = [entry for entry in entries if _is_included(entry)]
    tag_counts = Counter(tag for entry in included for tag in entry.get("tags", ()))
    noun_counts = Counter(_head_noun(entry["label"]) for entry in included)
    return [
        _concept(entry, shortcodes.get(entry["hexcode"], ()), tag_counts, noun_counts)
        for entry in included
    ]


def _read_member(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:  # a folder or a link
        raise ValueError(f"{archive.name}: {member} is not a regular file")
    return file.read()


def _head_noun(name: str) -> str:
    """Return the head noun of an emoji name: "tree" for "deciduous tree"."""
    return re.split(r"[,:]| (?:with|in|of|on|and|behind|without) ", name)[0].split()[-1]


def _is_included(entry: dict) -> bool:
    """Return whether to train on an emoji; flags, clock times and variants are excluded."""
    label = entry["label"]
    if entry.get("group") not in GROUPS or _TIME.search(label):
        return False
    if "1F3FB" in entry["hexcode"]:
        return False
    if entry["group"] == 1 and ("family" in label or "couple" in label or "kiss" in label):
        return False
    # People with a profession or a pose also have a gender-neutral emoji, which is included; so are
    # "man" and "woman" without one.
    is_gendered = entry["group"] == 1 and _GENDERED.search(label) and "200D" in entry["hexcode"]
    is_mirrored = "facing right" in label
    return not (is_gendered or is_mirrored)


def _concept(
    entry: dict, shortcodes: list[str] | str, tag_counts: Counter, noun_counts: Counter
) -> Concept:
    """Return the concept of one entry of emojibase, with its captions and their probabilities.

    `tag_counts` and `noun_counts` are the numbers of entries that share each tag and head noun.
    """
    name = entry["label"].replace("“", "").replace("”", "").replace("’", "'").replace("⊛ ", "")
    captions = defaultdict(float, {name.lower(): 4.0})
    first = name.split()[0]
    captions[f"{'an' if first[0].lower() in 'aeiou' else 'a'} {name.lower()}"] += 1.0
    codes = [shortcodes] if isinstance(shortcodes, str) else shortcodes[:2]
    codes = [re.sub(r"\d+$", "", code.replace("_", " ").replace("-", " ")) for code in codes]
    for code in codes:
        if caption := code.strip().lower():
            captions[caption] += 1.5
    known = {name.lower(), *name.lower().split(), *entry.get("tags", ())}
    single = [text for text in (name.lower(), *codes) if text in known and len(text.split()) == 1]
    plain = single[0] if single else None
    # The fewer concepts share a head noun or a keyword, the more often it is the caption.
    if len(name.split()) > 1 and noun_counts[_head_noun(entry["label"])] < 10:
        captions[_head_noun(name).lower()] += 2.0 / noun_counts[_head_noun(entry["label"])]
    tags = sorted(entry.get("tags", ()), key=lambda tag: tag_counts[tag])[:3]
    for tag in tags:
        if _PLAIN_TAG.fullmatch(tag.lower()):
            captions[tag.lower()] += 1.0 / tag_counts[tag] + (0.5 if tag in name.split() else 0.0)
    total = sum(captions.values())
    group = entry["group"]
    is_sign = bool(_SIGN.search(name))
    return Concept(
        code=entry["hexcode"].lower(),
        name=name,
        plain=plain,
        captions={caption: weight / total for caption, weight in captions.items()},
        group=group,
        weight=GROUPS[group][1] * (0.3 if is_sign else 1.0),
        directed=is_sign or group in (1, 8) or bool(_DIRECTED.search(name)),
    )


def load_images(
    folder: Path,
    style: Style,
    concepts: list[Concept],
    decode: Callable[[bytes, int], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Load the images of one style.

    Args:
        folder: holds the npm packages that `fetch` downloads.
        style: the style of images to load.
        concepts: the concepts to load; those that the style lacks are skipped.
        decode: decodes the bytes of a file to an image of a given size; None for `on_white`.

    Returns:
        A dict from the code of each concept to its image on white, uint8 [SIZE, SIZE, 3].
    """
    # Codes occur with and without U+FE0F, the variation selector for colour.
    codes = {_normalize_code(concept.code): concept.code for concept in concepts}
    images: dict[str, np.ndarray] = {}
    with tarfile.open(folder / style.package.file) as archive:
        for member in archive:
            name = member.name
            if not (name.startswith(style.folder) and name.endswith(style.suffix)):
                continue
            code = codes.get(_normalize_code(name[len(style.folder) : -len(style.suffix)]))
            if code is not None:
                images[code] = (decode or on_white)(_read_member(archive, member), SIZE)
    return images


def _normalize_code(code: str) -> str:
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def on_white(data: bytes, size: int) -> np.ndarray:
    """Decode an image file, composite it on white and resize it to a square.

    The image is resized with premultiplied alpha; otherwise the colours of transparent pixels would
    bleed into the edges.

    Args:
        data: the bytes of the file.
        size: height and width of the result in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGBA").convert("RGBa")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        rgba = np.asarray(image, np.int32)  # [size, size, 4]
    return np.clip(rgba[..., :3] + 255 - rgba[..., 3:], 0, 255).astype(np.uint8)


def downscale(images: np.ndarray, size: int) -> np.ndarray:
    """Downscale images by averaging blocks of pixels, and convert them to float.

    Args:
        images: uint8 [n, Y, Y, 3].
        size: height and width of the result; divides Y.

    Returns:
        float32 [n, size, size, 3], -1 to 1.
    """
    block = images.shape[1] // size
    x = images.reshape(-1, size, block, size, block, 3).astype(np.float32)
    return x.mean((2, 4)) / 127.5 - 1


# The dataset


def is_held_out(concept: Concept, style: Style) -> bool:
    """Return whether the image of a concept in a style is held out for evaluation."""
    return hashlib.sha256(f"{concept.code} {style.caption}".encode()).digest()[0] < 8


def styled_caption(caption: str, style: int | None) -> str:
    """Append the name of a style (an index into `STYLES`) to a caption, unless it is None."""
    return caption if style is None else f"{caption}, {STYLES[style].caption}"


def build_dataset(
    folder: Path, encode: Callable[[Sequence[str]], PromptEmbeds], target: Path
) -> None:
    """Build an `EmojiDataset` and write it to a folder.

    Args:
        folder: holds the npm packages that `fetch` downloads.
        encode: encodes captions; a `text.TextEncoder`.
        target: the folder to write to; created if needed.
    """
    concepts = load_concepts(folder)
    images, rows = [], []
    for number, style in enumerate(STYLES):
        style_images = load_images(folder, style, concepts)
        for row, concept in enumerate(concepts):
            if concept.code in style_images:
                images.append(style_images[concept.code])
                rows.append((row, number, is_held_out(concept, style)))
    texts = dict.fromkeys(
        styled_caption(caption, style)
        for concept in concepts
        for caption in concept.captions
        for style in (None, *range(len(STYLES)))
    )
    embeds = encode(list(texts))
    target.mkdir(parents=True, exist_ok=True)
    np.savez(
        target / "pictures.npz",
        images=np.stack(images),
        rows=np.array(rows, np.int32),
        mask=np.asarray(embeds.mask),
        pooled=np.asarray(embeds.pooled, np.float16),
    )
    np.save(target / "states.npy", np.asarray(embeds.states, np.float16))
    names = {"concepts": [asdict(concept) for concept in concepts], "texts": list(texts)}
    (target / "names.json").write_text(json.dumps(names), "utf-8")


class EmojiDataset:
    """The images and captions of emoji-64, with the embeddings of the captions.

    Attributes:
        images: uint8 [n, SIZE, SIZE, 3].
        concept_ids: int [n], the index into `concepts` of each image.
        style_ids: int [n], the index into `STYLES` of each image.
        held_out: bool [n], whether each image is held out for evaluation.
        concepts: all concepts.
        caption_rows: a dict from each caption to its row index in `states`, `mask` and `pooled`.
        states: float16 [captions, S, E], encoder states of the tokens, memory-mapped.
        mask: bool [captions, S], False for padding.
        pooled: float16 [captions, E], sentence embeddings.
    """

    def __init__(self, folder: Path):
        """Load the dataset that `build_dataset` wrote to a folder."""
        with np.load(folder / "pictures.npz") as arrays:
            self.images = arrays["images"]
            self.concept_ids, self.style_ids, held_out = arrays["rows"].T
            self.mask, self.pooled = arrays["mask"], arrays["pooled"]
        self.held_out = held_out.astype(bool)
        self.states = np.load(folder / "states.npy", mmap_mode="r")
        names = json.loads((folder / "names.json").read_text("utf-8"))
        self.concepts = [Concept(**concept) for concept in names["concepts"]]
        self.caption_rows = {text: row for row, text in enumerate(names["texts"])}

    def downscaled_images(self, indices: np.ndarray, size: int) -> np.ndarray:
        """Return the selected images, downscaled: float32 [n, size, size, 3], -1 to 1.

        Args:
            indices: int [n], the indices of the images.
            size: height and width of the result; divides `SIZE`.
        """
        return downscale(self.images[indices], size)

    def caption_embeds(self, captions: Sequence[str]) -> dict[str, Any]:
        """Return the embeddings of captions, as a dict of the fields of `PromptEmbeds`."""
        rows = np.array([self.caption_rows[caption] for caption in captions])
        return {
            "states": self.states[rows],
            "mask": self.mask[rows],
            "pooled": self.pooled[rows],
        }

    def sample_caption(self, random: np.random.Generator, image: int) -> str:
        """Return a random caption of an image, followed by the name of its style half of the time.

        Args:
            random: the random number generator.
            image: the index of the image.
        """
        captions = self.concepts[self.concept_ids[image]].captions
        caption = list(captions)[random.choice(len(captions), p=list(captions.values()))]
        return styled_caption(
            caption, int(self.style_ids[image]) if random.random() < 0.5 else None
        )
