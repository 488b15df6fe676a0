"""`pellucid embed`: a vector for each text.

Texts are arguments, or lines piped in. One text a line of output: its numbers, separated by spaces,
or with `--json` OpenAI's answer as one object. `--output FILE.npy` writes the matrix for NumPy.
A text that is too long is an error, unless `--long-text-mode` says to cut it or to average chunks.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serve.cli import console, stdin
from serve.cli.options import Json, Stats, model_option
from serve.exceptions import DoesNotFit, WrongUsage

if TYPE_CHECKING:
    from serve.models.encoder import EmbeddingModel

DEFAULT_MODEL = "all-minilm-l6-v2"
MAX_TOKENS_HELP = (
    "Longest text to embed, in tokens, up to the positions of the model: 512 for "
    "all-minilm-l6-v2. [default: what the model is made for, 256]"
)


def embed(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts. Without any, each line piped in is one."),
    ] = None,
    model: Annotated[
        str,
        model_option("An embedding model of `pellucid models`, or NAME=PATH for a folder."),
    ] = DEFAULT_MODEL,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="The same as --long-text-mode truncate.")
    ] = False,
    long_text_mode: Annotated[
        Literal["truncate", "mean"] | None,
        typer.Option(
            help="What to do with a text that is too long: cut its end off, or average the vectors "
            "of its chunks."
        ),
    ] = None,
    max_embedding_tokens: Annotated[
        int | None, typer.Option(metavar="N", help=MAX_TOKENS_HELP)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a matrix for NumPy to this file.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto for the faster good one.")
    ] = "auto",
    stats: Stats = False,
    json: Json = False,
) -> None:
    """Turn texts into vectors."""
    lines = list(texts) if texts else _stdin_lines()
    if not lines:
        raise WrongUsage("there is no text: give some as arguments, or pipe lines in")
    if output is not None and output.suffix != ".npy":
        raise WrongUsage(f"{output}: the name of a NumPy file ends in .npy")
    if truncate and long_text_mode == "mean":
        raise WrongUsage("--truncate and --long-text-mode mean exclude each other: choose one")
    served = _load_model(model, dtype, max_embedding_tokens)
    import asyncio

    from serve.models import long_texts

    started = time.perf_counter()
    ids = [served.tokenizer.encode(text) for text in lines]
    mode = "truncate" if truncate else long_text_mode
    for number, found in enumerate(ids):
        if len(found) > served.context and mode is None:
            raise DoesNotFit(
                f"text {number + 1} has {len(found)} tokens, {served.id} reads {served.context}: "
                "shorten it, or give --long-text-mode truncate or mean"
            )
    cut = long_texts.truncated if mode == "truncate" else long_texts.split
    chunks = [cut(found, served.context) for found in ids]
    vectors = asyncio.run(served.embed([chunk for text in chunks for chunk in text]))
    vectors = long_texts.average(vectors, chunks, normalize=served.cfg.normalize)
    seconds = time.perf_counter() - started
    tokens = sum(len(chunk) for text in chunks for chunk in text)
    if output is not None:
        import numpy as np

        np.save(output, vectors)
        console.info(f"{output}: {len(vectors)} x {vectors.shape[1]}, float32")
    if json:
        console.write_json(_as_response(served.id, vectors.tolist(), tokens))
    elif output is None:
        for vector in vectors:
            console.write(" ".join(f"{x:.7g}" for x in vector.tolist()))
    if stats:
        console.info(
            f"[{len(lines)} texts · {tokens} tokens · {len(lines) / seconds:.0f} texts/s · "
            f"{tokens / seconds:.0f} tok/s · {served.dtype}]"
        )


def _load_model(name: str, dtype: str, max_tokens: int | None) -> "EmbeddingModel":
    from serve.cli import local
    from serve.models.encoder import load_embedding_model

    place = local.locate_model_of_kind(name, "encoder", f"{DEFAULT_MODEL} does")
    with local.report_load_errors(place):
        return load_embedding_model(
            place.id,
            place.path,
            owned_by=place.publisher,
            dtype=dtype,
            max_tokens=max_tokens,
            notify=console.info,
        )


def _stdin_lines() -> list[str]:
    """The lines of what is piped in; a terminal is not read."""
    return [] if sys.stdin is None or sys.stdin.isatty() else stdin.read().splitlines()


def _as_response(id: str, vectors: list[list[float]], tokens: int) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "model": id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
