"""Shows how a vocabulary cuts a text: `python -m bpe --vocab model.gguf "hello world"`.

On a terminal, pieces stand side by side in alternating colours, their ids below. In a pipe, or with
NO_COLOR set, there is one line for each token: its id, a tab, its text as a Python literal.
"""

from __future__ import annotations

import argparse
import os
import sys

import bpe

_BACKGROUNDS = (153, 223, 157, 217, 189)  # pale ones of the terminal's 256, under black text


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (0, or 1 if the vocabulary cannot be read)."""
    parser = argparse.ArgumentParser(
        prog="python -m bpe", description="Shows the tokens of a text."
    )
    parser.add_argument(
        "--vocab",
        required=True,
        metavar="PATH",
        help="a .gguf or .tiktoken file, a tokenizer.json, or a folder holding one",
    )
    parser.add_argument("text", nargs="?", help="the text; standard input if not given")
    args = parser.parse_args(argv)
    try:
        encoding = bpe.load(args.vocab).encoding
    except (OSError, ValueError) as error:
        print(f"python -m bpe: {error}", file=sys.stderr)
        return 1
    ids = encoding.encode(
        sys.stdin.read() if args.text is None else args.text, allowed_special="all"
    )
    pieces = encoding.decode_tokens_bytes(ids)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print((coloured if colour else plain)(ids, pieces))
    return 0


def plain(ids: list[int], pieces: list[bytes]) -> str:
    """One line for each token; one that holds half a character is shown as bytes: b'\\xf0\\x9f'."""
    lines = []
    for id, piece in zip(ids, pieces, strict=True):
        try:
            lines.append(f"{id}\t{piece.decode()!r}")
        except UnicodeDecodeError:
            lines.append(f"{id}\t{piece!r}")
    return "\n".join(lines)


def coloured(ids: list[int], pieces: list[bytes]) -> str:
    """The text in one paragraph of coloured pieces, and the ids in another."""

    def paint(i: int, text: str) -> str:
        return f"\x1b[30;48;5;{_BACKGROUNDS[i % len(_BACKGROUNDS)]}m{text}\x1b[0m"

    # What could move the cursor is shown as an escape; a newline also ends the line.
    shown = [
        "".join(
            c if c.isprintable() else repr(c)[1:-1] + "\n" * (c == "\n")
            for c in piece.decode(errors="backslashreplace")
        )
        for piece in pieces
    ]
    text = "".join(
        "\n".join(paint(i, line) if line else "" for line in piece.split("\n"))
        for i, piece in enumerate(shown)
    )
    return text + "\n\n" + " ".join(paint(i, str(id)) for i, id in enumerate(ids))


if __name__ == "__main__":
    raise SystemExit(main())
