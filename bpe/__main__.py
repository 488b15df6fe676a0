"""Tokens from the command line: `python -m bpe "hello world"` shows how a text is cut.

    python -m bpe [show] TEXT     pieces in colours and their ids; in a pipe, a line for each token
    python -m bpe encode TEXT     ids
    python -m bpe decode ID ...   text
    python -m bpe count TEXT      how many tokens, and how far one reaches
    python -m bpe compare TEXT    the same for several vocabularies
    python -m bpe explain TEXT    the merges of every word, one by one
    python -m bpe train FILE ...  a vocabulary of your own

Texts may also be files (`-f`) or standard input. The answer goes to standard output and nothing
else does; with `--json` it is one JSON object. Errors exit with 1, wrong usage with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import bpe
from bpe import explain
from bpe.pretokenize import PATTERNS

_BACKGROUNDS = (153, 223, 157, 217, 189)  # pale ones of the terminal's 256, under black text
_DEFAULT_VOCAB = "o200k_base"


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = _build_parser()
    if not argv and sys.stdin.isatty():
        parser.print_help()
        return 0
    if not argv or argv[0] not in {*commands, "-h", "--help"}:
        argv = ["show", *argv]
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows its code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        commands[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"python -m bpe: {what}", file=sys.stderr)
        return 1
    except (ValueError, ModuleNotFoundError) as error:
        print(f"python -m bpe: {error}", file=sys.stderr)
        return 1
    return 0


def _build_parser() -> tuple[argparse.ArgumentParser, dict]:
    parser = argparse.ArgumentParser(
        prog="python -m bpe",
        description='Tokens. `python -m bpe "some text"` shows how it is cut.',
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}

    def command(function, name: str, help: str) -> argparse.ArgumentParser:
        commands[name] = function
        return subparsers.add_parser(name, help=help, description=help[:1].upper() + help[1:] + ".")

    def vocabulary(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--vocab",
            default=_DEFAULT_VOCAB,
            metavar="NAME|PATH",
            help="an encoding of OpenAI's, a model of theirs, a .gguf or .tiktoken file, "
            f"a tokenizer.json, or a folder holding one; default {_DEFAULT_VOCAB}",
        )

    def text(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("text", nargs="?", help="the text; standard input if not given")
        parser.add_argument(
            "-f", "--file", action="append", type=Path, help="read the text from here (repeatable)"
        )

    show = command(_show, "show", "show the tokens of a text")
    encode = command(_encode, "encode", "print the ids of a text")
    decode = command(_decode, "decode", "print the text of ids")
    count = command(_count, "count", "count tokens, and measure how much text one is")
    compare = command(_compare, "compare", "measure a text with several vocabularies")
    merges = command(_explain, "explain", "show the merges of every word, one by one")
    train = command(_train, "train", "train a vocabulary on files")

    for each in (show, encode, count, merges):
        vocabulary(each)
        text(each)
    vocabulary(decode)
    decode.add_argument("ids", nargs="*", help="ids; standard input if not given")
    text(compare)
    compare.add_argument(
        "--vocab",
        action="append",
        metavar="NAME|PATH",
        help="one to compare (repeatable); default: OpenAI's encodings",
    )
    for each in (encode, count, compare):
        each.add_argument("--json", action="store_true", help="print a JSON object")

    train.add_argument("files", nargs="+", metavar="FILE", help="texts in UTF-8")
    train.add_argument(
        "-o",
        "--output",
        action="append",
        required=True,
        type=Path,
        help="where to: a .json holds all, a .tiktoken tokens and ranks (repeatable)",
    )
    train.add_argument("--vocab-size", type=int, default=32_000, help="tokens; default 32000")
    train.add_argument(
        "--pattern",
        default="gpt2",
        metavar="NAME|REGEX",
        help=f"the split pattern: {', '.join(PATTERNS)}, or one of your own; default gpt2",
    )
    train.add_argument(
        "--special-token",
        dest="special",
        action="append",
        metavar="TOKEN",
        help="a special token (repeatable); default <|endoftext|>",
    )
    train.add_argument("--special", action="append", help=argparse.SUPPRESS)  # old name
    train.add_argument(
        "--min-frequency", type=int, default=2, help="times a pair must occur; default 2"
    )
    train.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return parser, commands


# Commands


def _show(args: argparse.Namespace) -> None:
    encoding = _load_encoding(args.vocab)
    ids = encoding.encode(_read_text(args), allowed_special="all")
    pieces = encoding.decode_tokens_bytes(ids)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print((format_colored if colour else format_plain)(ids, pieces))


def _encode(args: argparse.Namespace) -> None:
    ids = _load_encoding(args.vocab).encode(_read_text(args), allowed_special="all")
    print(json.dumps({"ids": ids}) if args.json else " ".join(map(str, ids)))


def _decode(args: argparse.Namespace) -> None:
    encoding = _load_encoding(args.vocab)
    ids = []
    for word in args.ids or sys.stdin.read().replace(",", " ").strip("[] \n").split():
        try:
            ids.append(int(word))
        except ValueError:
            raise ValueError(f"{word!r} is not an id") from None
    try:
        data = encoding.decode_bytes(ids)
    except (KeyError, OverflowError) as error:
        raise ValueError(f"{encoding.name}: {error.args[0]}") from None
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    if sys.stdout.isatty():
        print()


def _count(args: argparse.Namespace) -> None:
    measures = explain.measure(_load_encoding(args.vocab), _read_text(args))
    if args.json:
        print(json.dumps(_as_dict(measures)))
        return
    print(f"{measures.tokens:>12,} tokens")
    for name in ("characters", "words", "bytes"):
        amount = getattr(measures, name)
        print(f"{amount:>12,} {name:<10}  {measures.per_token(amount):5.2f} a token")


def _compare(args: argparse.Namespace) -> None:
    text = _read_text(args)
    names = args.vocab or bpe.list_encoding_names()
    found = {name: explain.measure(_load_encoding(name), text) for name in names}
    if args.json:
        print(json.dumps({name: _as_dict(measures) for name, measures in found.items()}))
        return
    width = max(10, *map(len, found))
    print(f"{'':{width}}  {'tokens':>10}  characters a token  words a token")
    for name, measures in found.items():
        characters = measures.per_token(measures.characters)
        words = measures.per_token(measures.words)
        print(f"{name:{width}}  {measures.tokens:>10,}  {characters:>18.2f}  {words:>13.2f}")


def _explain(args: argparse.Namespace) -> None:
    print(explain.explain(_load_encoding(args.vocab), _read_text(args)))


def _train(args: argparse.Namespace) -> None:
    from bpe.save import check_output_path, save
    from bpe.train import read_files
    from bpe.trainer import train

    for path in args.output:
        check_output_path(path)  # before the work, not after it
    pattern = _resolve_pattern(args.pattern)
    started = time.perf_counter()
    noted = -1.0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal noted
        if (now := time.perf_counter()) - noted > 0.2:
            noted = now
            of = f" of {total:,}" if total else " characters"
            print(f"\r\x1b[K{stage}: {done:,}{of}", end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty() and not args.quiet
    encoding = train(
        read_files(args.files),
        vocab_size=args.vocab_size,
        pattern=pattern,
        special_tokens=args.special or ["<|endoftext|>"],
        min_frequency=args.min_frequency,
        name=args.output[0].stem,
        progress=progress if terminal else None,
    )
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr)
    if not args.quiet:
        seconds = time.perf_counter() - started
        print(f"{encoding.n_vocab:,} tokens in {seconds:.1f} s", file=sys.stderr)
    for path in args.output:
        save(encoding, path)
        print(path)


# What they share


def _read_text(args: argparse.Namespace) -> str:
    parts = [] if args.text is None else [args.text]
    for path in args.file or ():
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from None
    text = "".join(parts) if parts else sys.stdin.read()
    try:
        text.encode()
    except UnicodeEncodeError as error:  # so Python hands over bytes that it could not decode
        raise ValueError(
            f"the text is not UTF-8: character {error.start} is {text[error.start]!r}"
        ) from None
    return text


def _resolve_pattern(name: str) -> str:
    """A split pattern: one of ours by its name, or a regular expression as it is."""
    if name in PATTERNS:
        return PATTERNS[name]
    if re.fullmatch(r"[\w-]+", name):  # as a pattern, it would find this word and nothing else
        close = difflib.get_close_matches(name, PATTERNS, 1)
        raise ValueError(
            f"--pattern {name}: no pattern has this name"
            + (f"; did you mean {close[0]}?" if close else f"; there are {', '.join(PATTERNS)}")
            + f" (a regular expression for just this word is (?:{name}))"
        )
    return name


def _load_encoding(name: str) -> bpe.Encoding:
    """An encoding by its own name, from a file, or by the name of a model of OpenAI's."""
    if name in bpe.list_encoding_names():
        return bpe.get_encoding(name)
    if Path(name).exists() or Path(name).suffix in (".gguf", ".json", ".tiktoken"):
        return bpe.load(name).encoding
    try:
        return bpe.encoding_for_model(name)
    except KeyError:
        known = ", ".join(bpe.list_encoding_names())
        raise ValueError(
            f"--vocab {name}: neither an encoding ({known}), nor a file, nor a model of OpenAI's"
        ) from None


def _as_dict(measures: explain.Measures) -> dict[str, float]:
    return dataclasses.asdict(measures) | {
        f"{name}_per_token": round(measures.per_token(getattr(measures, name)), 4)
        for name in ("characters", "words")
    }


def format_plain(ids: Sequence[int], pieces: Sequence[bytes]) -> str:
    """One line for each token; one that holds half a character is shown as bytes: b'\\xf0\\x9f'."""
    lines = []
    for id, piece in zip(ids, pieces, strict=True):
        try:
            lines.append(f"{id}\t{piece.decode()!r}")
        except UnicodeDecodeError:
            lines.append(f"{id}\t{piece!r}")
    return "\n".join(lines)


def format_colored(ids: Sequence[int], pieces: Sequence[bytes]) -> str:
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
