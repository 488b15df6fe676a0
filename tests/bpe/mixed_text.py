"""Mixed text for comparing tokenizers: scripts, code, emoji, whitespace runs, combining marks.

`documents(megabytes)` generates half of the text with a seed. The other half is prose and code: the
repository's own files and the sources of Python's standard library.
"""

from __future__ import annotations

import itertools
import random
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# First and last code point of each script, and whether words are separated by spaces.
_SCRIPTS = [
    (0x61, 0x7A, True), (0xC0, 0x24F, True), (0x370, 0x3FF, True), (0x400, 0x4FF, True),
    (0x531, 0x587, True), (0x5D0, 0x5EA, True), (0x620, 0x66F, True), (0x904, 0x94D, True),
    (0x985, 0x9CD, True), (0xB85, 0xBCD, True), (0xC05, 0xC4D, True), (0xE01, 0xE4E, False),
    (0xE81, 0xECD, False), (0xF40, 0xF84, True), (0x1000, 0x103F, False), (0x10D0, 0x10FF, True),
    (0x1200, 0x137F, True), (0x13A0, 0x13F5, True), (0x1780, 0x17D3, False), (0x1E00, 0x1EFF, True),
    (0x1F00, 0x1FFF, True), (0x3041, 0x30FF, False), (0x4E00, 0x9FFF, False),
    (0xAC00, 0xD7A3, True), (0xFB00, 0xFB4F, True), (0xFF10, 0xFF5A, False),
    (0x10400, 0x1044F, True), (0x1D400, 0x1D7FF, True), (0x20000, 0x2A6DF, False),
]  # fmt: skip
# tokenizers orders marks as in Unicode 9, which did not have these two.
_NEWER_MARKS = (0xC3C, 0xEBA)
_SPACES = " \t\n\r\v\f\x85\xa0\u2003\u2028\u3000\u200b\ufeff"
_SKINS, _JOINER = [chr(code) for code in range(0x1F3FB, 0x1F400)], "\u200d"
_EMOJI = [chr(code) for code in [*range(0x1F300, 0x1F650), *range(0x1F900, 0x1FA00), 0x2764]]
_FLAGS = [chr(code) for code in range(0x1F1E6, 0x1F200)]
_MARKS = [chr(code) for code in [*range(0x300, 0x370), *range(0x20D0, 0x20F1), 0xFE0F, 0x5BF]]
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»“”‘’…—、。，！？·°§€£¥±×÷≤≥→⇒∑√∞"
_MARKUP = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\u2581",
    "\u2581\u2581",
    "[INST]",
    "##s",
    "<|im_end|>",
]
_CODE = ["def f(x):\n    return x", "x += 1;", "if (a&&b) {", "}\n\n", "\t\tfoo->bar[i]", "// ---",
         "<div id='a'>", "&nbsp;", "SELECT * FROM t", "http://x.y/z?q=1%20a", "camelCaseHTTPId",
         "don't we'll I'M HE'S", "0xFF 1e-9 3.14 1,234,567", "12345678901234567890"]  # fmt: skip


def documents(megabytes: float, seed: int = 0) -> list[str]:
    """Return texts of up to 60,000 characters, of about `megabytes` MB of UTF-8 in total."""
    limit = int(megabytes * 1e6)
    texts = [*_take(_generated(random.Random(seed)), limit // 2), *_take(_files(), limit // 2)]
    random.Random(seed).shuffle(texts)
    return texts


def _take(texts: Iterator[str], limit: int) -> list[str]:
    taken, size = [], 0
    for text in texts:
        taken.append(text)
        size += len(text.encode())
        if size > limit:
            break
    return taken


def _files() -> Iterator[str]:
    own = sorted(path for suffix in ("md", "py") for path in ROOT.glob(f"[!.]*/**/*.{suffix}"))
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    library = [path for path in library if "site-packages" not in path.parts]
    # One of each in turn, so that a small sample has both.
    for pair in itertools.zip_longest(own, library):
        for path in pair:
            if path is not None:
                yield path.read_text(encoding="utf-8", errors="replace")[:60_000]


def _generated(rng: random.Random) -> Iterator[str]:
    kinds: list[Callable[[], str]] = [*_scripts(rng), *_others(rng)]
    while True:
        some = rng.sample(kinds, 4)
        length = rng.choice([3, 30, 300, 1000])
        yield "".join(rng.choice(some)() for _ in range(length))


def _scripts(rng: random.Random) -> Iterator[Callable[[], str]]:
    """Yield for each script a function that returns one of its words, some of them often."""
    for first, last, has_spaces in _SCRIPTS:
        letters = [
            chr(code)
            for code in range(first, last + 1)
            if unicodedata.category(chr(code))[0] in "LM" and code not in _NEWER_MARKS
        ]
        words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(2000)]
        words += [word.title() for word in words[:200]]
        ends = [" "] * 8 + [", ", ". ", "\n"] if has_spaces else [""] * 5 + ["，", "。\n", " "]
        yield (
            lambda words=words, ends=ends: (
                words[int(len(words) * rng.random() ** 3)] + rng.choice(ends)
            )
        )


def _others(rng: random.Random) -> Iterator[Callable[[], str]]:
    def emoji() -> str:
        person = rng.choice(_EMOJI) + rng.choice(["", "", rng.choice(_SKINS), "\ufe0f"])
        family = _JOINER.join(rng.choices(_EMOJI, k=rng.randint(2, 4)))
        return rng.choice([person, family, "".join(rng.choices(_FLAGS, k=2)), "3\ufe0f\u20e3 "])

    def any_character() -> str:
        code = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)])
        # The class of a character that a later Unicode assigns depends on the version of a library.
        return "\ufffd" if unicodedata.category(chr(code)) in ("Cn", "Cs") else chr(code)

    yield emoji
    yield any_character
    yield lambda: rng.choice(_SPACES) * rng.choice([1, 1, 2, 3, 4, 8, 40])
    yield lambda: "".join(rng.choices(_SPACES, k=rng.randint(1, 6)))
    yield lambda: chr(rng.randint(0x61, 0x7A)) + "".join(rng.choices(_MARKS, k=rng.randint(1, 4)))
    yield lambda: unicodedata.normalize("NFD", chr(rng.randint(0xC0, 0x24F)) + "각")
    yield lambda: rng.choice(_PUNCTUATION) * rng.choice([1, 1, 1, 2, 3, 20]) + rng.choice(["", " "])
    yield lambda: str(rng.randrange(10 ** rng.randint(1, 20))) + rng.choice(["", " ", "."])
    yield lambda: chr(rng.choice([0x660, 0x966, 0xFF10]) + rng.randrange(10))
    yield lambda: rng.choice(_MARKUP) + rng.choice(["", " ", "\n"])
    yield lambda: rng.choice(_CODE) + rng.choice(["", " ", "\n"])
