"""A corpus of text in many languages and formats, for comparing tokenizers.

    python tests/bench/corpus.py

The texts come from Debian packages and the Python standard library, one text file per kind (see
`KINDS`). Packages are downloaded with `apt-get download` into the cache folder and unpacked there,
not installed. No program in them is run, except the one that prints the text of the Bible, which
has its own file format. Needs Debian or a distribution derived from it.
"""

from __future__ import annotations

import gettext
import gzip
import html
import itertools
import random
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import platformdirs

FOLDER = Path(platformdirs.user_cache_dir("pellucid")) / "corpus"


def load(kind: str) -> str:
    """Return the text of a kind in `KINDS`; it is downloaded and extracted at the first call.

    Raises:
        RuntimeError: apt-get or dpkg-deb is not installed.
    """
    path = FOLDER / f"{kind}.txt"
    if not path.exists():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise RuntimeError("apt-get and dpkg-deb are needed to download Debian packages")
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(KINDS[kind]().encode())
        unfinished.rename(path)
    return path.read_bytes().decode()


def _package(name: str) -> Path:
    """Return the folder of an unpacked package; it is downloaded at the first call."""
    folder = FOLDER / "packages" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["apt-get", "download", "-q", name], cwd=folder.parent, check=True, capture_output=True
        )
        (archive,) = folder.parent.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, f"{folder}.part"], check=True)
        Path(f"{folder}.part").rename(folder)
    return folder


def _manual_pages(language: str, at_least: float = 0.0) -> str:
    """Return the source of manual pages; keep lines with more than a share of non-ASCII characters.

    If `at_least` is 0, all lines are kept.
    """
    pages = sorted(_package(f"manpages-{language}").glob("usr/share/man/**/*.gz"))
    text = "".join(_gunzip(page) for page in pages if page.is_file())
    return _lines(text, at_least)


def _lines(text: str, at_least: float) -> str:
    if not at_least:
        return text
    lines = dict.fromkeys(text.split("\n"))
    return "\n".join(line for line in lines if sum(c > "\x7f" for c in line) > at_least * len(line))


def _gunzip(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode(errors="replace")


def _bible() -> str:
    program = _package("bible-kjv") / "usr/bin/bible"
    data = _package("bible-kjv-text") / "usr/lib"
    verses = [program, "-p", data, "-f", "gen1:1-rev22:21"]
    return subprocess.run(verses, check=True, capture_output=True).stdout.decode()


def _dictionary() -> str:
    return _gunzip(_package("dict-gcide") / "usr/share/dictd/gcide.dict.dz")


def _python() -> str:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    own = (path for path in paths if "site-packages" not in path.parts)
    return "".join(path.read_bytes().decode(errors="replace") for path in own)


def _hindi() -> str:
    lines: dict[str, None] = {}
    for path in sorted(_package("libreoffice-l10n-hi").glob("**/*.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        lines |= dict.fromkeys(text for key, text in catalogue.items() if key)
    return _lines("\n".join(lines) + _help("hi"), 0.3)


def _help(language: str) -> str:
    """Return the text of LibreOffice's help pages, without repeated lines."""
    lines: dict[str, None] = {}
    for path in sorted(_package(f"libreoffice-help-{language}").glob("**/*.html")):
        text = re.sub(
            r"</?(?:a|b|i|em|span|code|strong)\b[^>]*>", "", path.read_text(errors="replace")
        )
        text = re.sub(r"(?s)<script.*?</script>|<[^>]*>", "\n", text)
        lines |= dict.fromkeys(html.unescape(text).split("\n"))
    return "\n".join(lines)


def _emoji() -> str:
    """Return English words, with one to three emoji after about every third word."""
    path = _package("unicode-data") / "usr/share/unicode/emoji/emoji-test.txt"
    emoji = re.findall(r"# (\S+) E[\d.]+ ", path.read_text())
    rng = random.Random(0)
    parts = []
    for word in itertools.islice(_bible().split(), 250_000):
        parts.append(word)
        if rng.random() < 0.3:
            parts.append("".join(rng.choices(emoji, k=rng.choice([1, 1, 1, 2, 3]))))
        if rng.random() < 0.05:
            parts.append("\n")
    return " ".join(parts)


def _locale() -> str:
    """Return XML with names of languages, places, units and months in hundreds of languages."""
    folder = _package("unicode-cldr-core") / "usr/share/unicode/cldr/common/main"
    return "".join(path.read_text() for path in sorted(folder.glob("*.xml")))[:30_000_000]


KINDS: dict[str, Callable[[], str]] = {
    "english": lambda: _bible() + _help("en-us"),
    "dictionary": _dictionary,
    "python": _python,
    "russian": lambda: _manual_pages("ru", 0.3),
    "chinese": lambda: _manual_pages("zh", 0.2),
    "japanese": lambda: _manual_pages("ja", 0.3),
    "german": lambda: _manual_pages("de"),
    "french": lambda: _manual_pages("fr"),
    "hindi": _hindi,
    "emoji": _emoji,
    "locale": _locale,
}

if __name__ == "__main__":
    for kind in KINDS:
        print(f"{kind:12} {len(load(kind).encode()) / 1e6:6.1f} MB")
