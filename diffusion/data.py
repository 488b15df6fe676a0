"""The emoji that the image model learns from: three drawn sets, their captions, and who may be fed.

Pictures come from packages with pinned hashes: Noto (emoji-datasource-google, Apache-2.0), Twemoji
(emoji-datasource-twitter, CC-BY-4.0) and Fluent in 3D (@lobehub/fluent-emoji-3d, MIT); names and
keywords from emojibase-data (MIT). The datasource packages exist for Apple and Facebook too; those
pictures are not free, and nothing here reads them. A picture and the names of its concept make an
example: "red apple", "an apple", "apple, flat style".

Emoji are an odd sample of the world: one in seven is a flag, and people come in five skins and
three genders. So variants are left out and rare kinds are drawn less often (`WEIGHTS`), or a model
that sees few pictures would spend most of them on flags.

One picture in thirty is held out: a known concept in a style it is never seen in. Which, follows
from its name, so that it stays the same when the data grow.

Leaves out: transparency. Pictures are laid on white, because most of what a model could learn of an
emoji's outline it sees against any one ground.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.text import PromptEmbeds

SIZE = 64  # of the pictures kept, in pixels


@dataclass(frozen=True)
class Package:
    """An npm package of exactly these bytes."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def file(self) -> str:
        """The name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """A set of pictures: how it is asked for, and where the picture of a code lies."""

    caption: str
    package: Package
    folder: str  # in the package
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

# emojibase's numbers of groups, and how often a concept of each is drawn. Left out: 2, skin tones
# and hair on their own; 9, flags.
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
# Pictures whose mirror image says something else, or nothing: the moon's phases, what rises or
# falls, maps, hands, and whatever bears letters, figures or notes.
_DIRECTED = re.compile(
    r"\b(hands?|left|right|moon|globe|map|chart|departure|arrival|clock|watch|stopwatch|calendar|"
    r"medal|banknote|coin|money bag|credit card|newspaper|dvd|dna|musical (note|notes|score)|ZZZ|"
    r"hundred points|stop|hospital|bank|hotel|convenience store|Statue of Liberty|pool 8 ball|"
    r"slot machine|joker|mahjong|cards)\b"
)
_PLAIN_TAG = re.compile(r"[a-z0-9 ]+")


@dataclass(frozen=True)
class Concept:
    """What an emoji shows.

    Attributes:
        code: code points in lower-case hexadecimal, "1f34e".
        name: "red apple".
        plain: the one word for it, "apple", if there is one; it may mean other concepts too.
        captions: how one might ask for it, the name first, with shares that sum to 1.
        group: a key of `GROUPS`.
        weight: how often it is drawn, relative to others.
        directed: whether its mirror image would be wrong (letters, hands, arrows, the moon).
    """

    code: str
    name: str
    plain: str | None
    captions: dict[str, float]
    group: int
    weight: float
    directed: bool


def fetch(folder: Path, packages: Sequence[Package] | None = None) -> None:
    """Downloads the packages that `folder` lacks, with npm, and checks every hash.

    Args:
        packages: those that `pack` reads, if none are named.

    Raises:
        ValueError: a package has other bytes than expected.
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
            raise ValueError(f"{path}: sha256 is {digest}, expected {package.sha256}")


def load_concepts(folder: Path) -> list[Concept]:
    """What is drawn, in Unicode's order, from the package of names in `folder`."""
    with tarfile.open(folder / NAMES_PACKAGE.file) as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
        shortcodes = json.load(archive.extractfile("package/en/shortcodes/iamcal.json"))
    kept = [entry for entry in entries if _is_included(entry)]
    shared = Counter(tag for entry in kept for tag in entry.get("tags", ()))
    heads = Counter(_head_noun(entry["label"]) for entry in kept)
    return [_concept(entry, shortcodes.get(entry["hexcode"], ()), shared, heads) for entry in kept]


def _head_noun(name: str) -> str:
    """The noun that the others qualify: "tree" in "deciduous tree"."""
    return re.split(r"[,:]| (?:with|in|of|on|and|behind|without) ", name)[0].split()[-1]


def _is_included(entry: dict) -> bool:
    """Whether this is a picture of something: no flag, no variant of another emoji."""
    label = entry["label"]
    if entry.get("group") not in GROUPS or _TIME.search(label):
        return False
    if "1F3FB" in entry["hexcode"]:
        return False
    if entry["group"] == 1 and ("family" in label or "couple" in label or "kiss" in label):
        return False
    # A person with a trade or a pose has a neutral form; "man" and "woman" alone stay.
    gendered = entry["group"] == 1 and _GENDERED.search(label) and "200D" in entry["hexcode"]
    facing = "facing right" in label
    return not (gendered or facing)


def _concept(entry: dict, shortcodes: list[str] | str, shared: Counter, heads: Counter) -> Concept:
    name = entry["label"].replace("“", "").replace("”", "").replace("’", "'").replace("⊛ ", "")
    captions: Counter[str] = Counter({name.lower(): 4.0})
    first = name.split()[0]
    captions[f"{'an' if first[0].lower() in 'aeiou' else 'a'} {name.lower()}"] += 1.0
    codes = [shortcodes] if isinstance(shortcodes, str) else shortcodes[:2]
    codes = [re.sub(r"\d+$", "", code.replace("_", " ").replace("-", " ")) for code in codes]
    for code in codes:
        if words := code.strip().lower():
            captions[words] += 1.5
    known = {name.lower(), *name.lower().split(), *entry.get("tags", ())}
    single = [text for text in (name.lower(), *codes) if text in known and len(text.split()) == 1]
    plain = single[0] if single else None
    # A noun or a keyword names this concept as far as it names few others.
    if len(name.split()) > 1 and heads[_head_noun(entry["label"])] < 10:
        captions[_head_noun(name).lower()] += 2.0 / heads[_head_noun(entry["label"])]
    tags = sorted(entry.get("tags", ()), key=lambda tag: shared[tag])[:3]
    for tag in tags:
        if _PLAIN_TAG.fullmatch(tag.lower()):
            captions[tag.lower()] += 1.0 / shared[tag] + (0.5 if tag in name.split() else 0.0)
    total = sum(captions.values())
    group = entry["group"]
    sign = bool(_SIGN.search(name))
    return Concept(
        code=entry["hexcode"].lower(),
        name=name,
        plain=plain,
        captions={text: share / total for text, share in captions.items()},
        group=group,
        weight=GROUPS[group][1] * (0.3 if sign else 1.0),
        directed=sign or group in (1, 8) or bool(_DIRECTED.search(name)),
    )


def load_images(
    folder: Path,
    style: Style,
    wanted: list[Concept],
    decode: Callable[[bytes, int], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The pictures of one style, by the concept's code; a concept that it lacks is left out.

    Args:
        decode: makes pixels of a file's bytes, as `on_white` does, which it is if not given.

    Returns:
        uint8 [SIZE, SIZE, 3] each, on white.
    """
    # The same emoji is spelled with or without U+FE0F, which asks for colour.
    codes = {_normalize_code(concept.code): concept.code for concept in wanted}
    found: dict[str, np.ndarray] = {}
    with tarfile.open(folder / style.package.file) as archive:
        for member in archive:
            name = member.name
            if not (name.startswith(style.folder) and name.endswith(style.suffix)):
                continue
            code = codes.get(_normalize_code(name[len(style.folder) : -len(style.suffix)]))
            if code is not None:
                found[code] = (decode or on_white)(archive.extractfile(member).read(), SIZE)
    return found


def _normalize_code(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def on_white(data: bytes, size: int) -> np.ndarray:
    """A picture file, laid on white and scaled to a square: uint8 [size, size, 3].

    Scaling happens with colours multiplied by their opacity, or what is hidden under transparent
    pixels would bleed into the edges.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGBA").convert("RGBa")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        rgba = np.asarray(image, np.int32)  # [size, size, 4]
    return np.clip(rgba[..., :3] + 255 - rgba[..., 3:], 0, 255).astype(np.uint8)


def downscale(images: np.ndarray, size: int) -> np.ndarray:
    """Pictures as networks see them, at a size that divides theirs.

    Args:
        images: uint8 [n, Y, Y, 3].

    Returns:
        float32 [n, size, size, 3], -1 to 1.
    """
    by = images.shape[1] // size
    x = images.reshape(-1, size, by, size, by, 3).astype(np.float32)
    return x.mean((2, 4)) / 127.5 - 1


# The pack: everything that training reads


def is_held_out(concept: Concept, style: Style) -> bool:
    """Whether a picture is kept for evaluation."""
    return hashlib.sha256(f"{concept.code} {style.caption}".encode()).digest()[0] < 8


def styled_caption(caption: str, style: int | None) -> str:
    """A caption that asks for a style, by its number, or leaves it open."""
    return caption if style is None else f"{caption}, {STYLES[style].caption}"


def build_dataset(
    folder: Path, read: Callable[[Sequence[str]], PromptEmbeds], target: Path
) -> None:
    """Writes a `Pack` into the folder `target`.

    Args:
        folder: holds the packages; see `fetch`.
        read: what captions mean; see `text.Reader`.
    """
    found = load_concepts(folder)
    images, rows = [], []
    for number, style in enumerate(STYLES):
        drawn = load_images(folder, style, found)
        for row, concept in enumerate(found):
            if concept.code in drawn:
                images.append(drawn[concept.code])
                rows.append((row, number, is_held_out(concept, style)))
    texts = dict.fromkeys(
        styled_caption(caption, style)
        for concept in found
        for caption in concept.captions
        for style in (None, *range(len(STYLES)))
    )
    heard = read(list(texts))
    target.mkdir(parents=True, exist_ok=True)
    np.savez(
        target / "pictures.npz",
        images=np.stack(images),
        rows=np.array(rows, np.int32),
        mask=np.asarray(heard.mask),
        pooled=np.asarray(heard.pooled, np.float16),
    )
    np.save(target / "states.npy", np.asarray(heard.states, np.float16))
    names = {"concepts": [asdict(concept) for concept in found], "texts": list(texts)}
    (target / "names.json").write_text(json.dumps(names), "utf-8")


class EmojiDataset:
    """Pictures, captions, and what the captions mean.

    Attributes:
        images: uint8 [n, SIZE, SIZE, 3].
        concept, style: int [n], what each shows and how.
        held_out: bool [n].
        concepts: what there is.
        texts: every caption, to its row in `states`.
    """

    def __init__(self, folder: Path):
        with np.load(folder / "pictures.npz") as arrays:
            self.images = arrays["images"]
            self.concept_ids, self.style_ids, held_out = arrays["rows"].T
            self.mask, self.pooled = arrays["mask"], arrays["pooled"]
        self.held_out = held_out.astype(bool)
        self.states = np.load(folder / "states.npy", mmap_mode="r")
        names = json.loads((folder / "names.json").read_text("utf-8"))
        self.concepts = [Concept(**concept) for concept in names["concepts"]]
        self.caption_rows = {text: row for row, text in enumerate(names["texts"])}

    def downscaled_images(self, which: np.ndarray, size: int) -> np.ndarray:
        """Some pictures at a size that divides `SIZE`: float32 [n, size, size, 3], -1 to 1."""
        return downscale(self.images[which], size)

    def caption_embeds(self, captions: Sequence[str]) -> dict[str, Any]:
        """What some captions of the pack mean; the fields of a `Text`."""
        rows = np.array([self.caption_rows[caption] for caption in captions])
        return {
            "states": self.states[rows],
            "mask": self.mask[rows],
            "pooled": self.pooled[rows],
        }

    def sample_caption(self, random: np.random.Generator, picture: int) -> str:
        """One of the ways to ask for a picture, its style named half of the time."""
        captions = self.concepts[self.concept_ids[picture]].captions
        caption = list(captions)[random.choice(len(captions), p=list(captions.values()))]
        return styled_caption(
            caption, int(self.style_ids[picture]) if random.random() < 0.5 else None
        )
