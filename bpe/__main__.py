"""Print tokens on the command line: `python -m bpe "hello world"` shows how a text is tokenized.

    python -m bpe [show] TEXT     colored tokens and their ids; in a pipe, one token per line
    python -m bpe encode TEXT     print the token ids
    python -m bpe decode ID ...   print the text
    python -m bpe count TEXT      count tokens, and characters and words per token
    python -m bpe compare TEXT    the same counts for several vocabularies
    python -m bpe explain TEXT    print every merge of every word
    python -m bpe train FILE ...  train a vocabulary

Text can also come from files (`-f`) or from standard input. Only results are written to standard
output; with `--json` the result is one JSON object. The exit status is 1 for an error and 2 for
wrong usage.
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

_BACKGROUNDS = (153, 223, 157, 217, 189)  # pale colors of the 256-color palette, for black text
_DEFAULT_VOCAB = "o200k_base"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments, without the program name; None takes those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = _build_parser()
    if not argv and sys.stdin.isatty():
        parser.print_help()
        return 0
    if not argv or argv[0] not in {*commands, "-h", "--help"}:
        argv = ["show", *argv]
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape what the terminal cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        commands[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `| head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"python -m bpe: {message}", file=sys.stderr)
        return 1
    except (ValueError, ModuleNotFoundError) as error:
        print(f"python -m bpe: {error}", file=sys.stderr)
        return 1
    return 0


def _build_parser() -> tuple[argparse.ArgumentParser, dict]:
    parser = argparse.ArgumentParser(
        prog="python -m bpe",
        description='Tokenize text. `python -m bpe "some text"` shows its tokens.',
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}

    def command(function, name: str, help: str) -> argparse.ArgumentParser:
        commands[name] = function
        return subparsers.add_parser(name, help=help, description=help[:1].upper() + help[1:] + ".")

    def add_vocab_option(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--vocab",
            default=_DEFAULT_VOCAB,
            metavar="NAME|PATH",
            help="name of an OpenAI encoding or model, a .gguf, .tiktoken or .model "
            f"file, a tokenizer.json, or a Hugging Face folder; default {_DEFAULT_VOCAB}",
        )

    def add_text_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("text", nargs="?", help="the text; default: standard input")
        parser.add_argument(
            "-f", "--file", action="append", type=Path, help="read text from a file (repeatable)"
        )

    show = command(_show, "show", "show the tokens of a text")
    encode = command(_encode, "encode", "print the ids of a text")
    decode = command(_decode, "decode", "print the text of ids")
    count = command(_count, "count", "count tokens, and characters and words per token")
    compare = command(_compare, "compare", "count tokens with several vocabularies")
    merges = command(_explain, "explain", "show every merge of every word")
    train = command(_train, "train", "train a vocabulary on files")

    for subparser in (show, encode, count, merges):
        add_vocab_option(subparser)
        add_text_arguments(subparser)
    add_vocab_option(decode)
    decode.add_argument("ids", nargs="*", help="token ids; default: standard input")
    add_text_arguments(compare)
    compare.add_argument(
        "--vocab",
        action="append",
        metavar="NAME|PATH",
        help="a vocabulary to compare (repeatable); default: the OpenAI encodings",
    )
    for subparser in (encode, count, compare):
        subparser.add_argument("--json", action="store_true", help="print a JSON object")

    train.add_argument("files", nargs="+", metavar="FILE", help="text files in UTF-8")
    train.add_argument(
        "-o",
        "--output",
        action="append",
        required=True,
        type=Path,
        help="output file (repeatable): .json is complete, .tiktoken has tokens and ranks only",
    )
    train.add_argument(
        "--vocab-size", type=int, default=32_000, help="number of tokens; default 32000"
    )
    train.add_argument(
        "--pattern",
        default="gpt2",
        metavar="NAME|REGEX",
        help=f"split pattern: {', '.join(PATTERNS)}, or a regular expression; default gpt2",
    )
    train.add_argument(
        "--special-token",
        action="append",
        metavar="TOKEN",
        help="a special token (repeatable); default <|endoftext|>",
    )
    train.add_argument(
        "--special", dest="special_token", action="append", help=argparse.SUPPRESS
    )  # old name
    train.add_argument(
        "--min-frequency", type=int, default=2, help="minimum count of a merged pair; default 2"
    )
    train.add_argument("-q", "--quiet", action="store_true", help="print no progress")
    return parser, commands


# Commands


def _show(args: argparse.Namespace) -> None:
    encoding = _load_encoding(args.vocab)
    ids = encoding.encode(_read_text(args), allowed_special="all")
    tokens = encoding.decode_tokens_bytes(ids)
    use_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print((format_colored if use_color else format_plain)(ids, tokens))


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
            raise ValueError(f"expected token ids, which are integers, got {word!r}") from None
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
        print(f"{amount:>12,} {name:<10}  {measures.per_token(amount):5.2f} per token")


def _compare(args: argparse.Namespace) -> None:
    text = _read_text(args)
    names = args.vocab or bpe.list_encoding_names()
    results = {name: explain.measure(_load_encoding(name), text) for name in names}
    if args.json:
        print(json.dumps({name: _as_dict(measures) for name, measures in results.items()}))
        return
    width = max(10, *map(len, results))
    print(f"{'':{width}}  {'tokens':>10}  characters per token  words per token")
    for name, measures in results.items():
        characters = measures.per_token(measures.characters)
        words = measures.per_token(measures.words)
        print(f"{name:{width}}  {measures.tokens:>10,}  {characters:>20.2f}  {words:>15.2f}")


def _explain(args: argparse.Namespace) -> None:
    print(explain.explain(_load_encoding(args.vocab), _read_text(args)))


def _train(args: argparse.Namespace) -> None:
    from bpe.save import check_output_path, save
    from bpe.train import read_files
    from bpe.trainer import train

    for path in args.output:
        check_output_path(path)  # fail before training, not after it
    pattern = _resolve_pattern(args.pattern)
    started = time.perf_counter()
    last_update = -1.0

    def print_progress(stage: str, done: int, total: int | None) -> None:
        nonlocal last_update
        if (now := time.perf_counter()) - last_update > 0.2:
            last_update = now
            unit = f" of {total:,}" if total else " characters"
            print(f"\r\x1b[K{stage}: {done:,}{unit}", end="", file=sys.stderr, flush=True)

    show_progress = sys.stderr.isatty() and not args.quiet
    encoding = train(
        read_files(args.files),
        vocab_size=args.vocab_size,
        pattern=pattern,
        special_tokens=args.special_token or ["<|endoftext|>"],
        min_frequency=args.min_frequency,
        name=args.output[0].stem,
        progress=print_progress if show_progress else None,
    )
    if show_progress:
        print("\r\x1b[K", end="", file=sys.stderr)
    if not args.quiet:
        seconds = time.perf_counter() - started
        print(f"{encoding.n_vocab:,} tokens in {seconds:.1f} s", file=sys.stderr)
    for path in args.output:
        save(encoding, path)
        print(path)


# Helpers


def _read_text(args: argparse.Namespace) -> str:
    parts = [] if args.text is None else [args.text]
    for path in args.file or ():
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
    text = "".join(parts) if parts else sys.stdin.read()
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python passes undecodable bytes as lone surrogates
        raise ValueError(
            f"the text is not UTF-8: character {error.start} is {text[error.start]!r}"
        ) from None
    return text


def _resolve_pattern(name: str) -> str:
    """Return the split pattern `PATTERNS[name]`; another `name` must be a pattern itself."""
    if name in PATTERNS:
        return PATTERNS[name]
    if re.fullmatch(r"[\w-]+", name):  # a misspelled name; as a pattern it matches only itself
        matches = difflib.get_close_matches(name, PATTERNS, 1)
        raise ValueError(
            f"--pattern {name}: unknown pattern"
            + (f"; did you mean {matches[0]}?" if matches else f"; choose {', '.join(PATTERNS)}")
            + f" (to match just this word, write (?:{name}))"
        )
    return name


def _load_encoding(name: str) -> bpe.Encoding:
    """Return the encoding for `name`: an encoding name, a file, a folder, or an OpenAI model."""
    if name in bpe.list_encoding_names():
        return bpe.get_encoding(name)
    if Path(name).exists() or Path(name).suffix in (".gguf", ".json", ".model", ".tiktoken"):
        return bpe.load(name).encoding
    try:
        return bpe.encoding_for_model(name)
    except KeyError:
        encoding_names = ", ".join(bpe.list_encoding_names())
        raise ValueError(
            f"--vocab: expected an encoding ({encoding_names}), an existing file or folder, or an "
            f"OpenAI model, got {name!r}"
        ) from None


def _as_dict(measures: explain.Measures) -> dict[str, float]:
    return dataclasses.asdict(measures) | {
        f"{name}_per_token": round(measures.per_token(getattr(measures, name)), 4)
        for name in ("characters", "words")
    }


def format_plain(ids: Sequence[int], tokens: Sequence[bytes]) -> str:
    r"""Return one line per token: its id, a tab, and its text.

    A token that is not complete UTF-8 is written as bytes: b'\xf0\x9f'.
    """
    lines = []
    for id, token in zip(ids, tokens, strict=True):
        try:
            lines.append(f"{id}\t{token.decode()!r}")
        except UnicodeDecodeError:
            lines.append(f"{id}\t{token!r}")
    return "\n".join(lines)


def format_colored(ids: Sequence[int], tokens: Sequence[bytes]) -> str:
    """Return the tokens in alternating background colors, then their ids in the same colors."""

    def colorize(i: int, text: str) -> str:
        return f"\x1b[30;48;5;{_BACKGROUNDS[i % len(_BACKGROUNDS)]}m{text}\x1b[0m"

    # Escape control characters, which could move the cursor. A newline also ends the line.
    escaped = [
        "".join(
            c if c.isprintable() else repr(c)[1:-1] + "\n" * (c == "\n")
            for c in token.decode(errors="backslashreplace")
        )
        for token in tokens
    ]
    text = "".join(
        "\n".join(colorize(i, line) if line else "" for line in token.split("\n"))
        for i, token in enumerate(escaped)
    )
    return text + "\n\n" + " ".join(colorize(i, str(id)) for i, id in enumerate(ids))


if __name__ == "__main__":
    raise SystemExit(main())
