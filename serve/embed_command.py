"""`pellucid embed`: a vector for each text.

Texts are arguments, or lines piped in. One text a line of output: its numbers, separated by spaces,
or with `--json` OpenAI's answer as one object. `--output FILE.npy` writes the matrix for NumPy.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve import terminal
from serve.failures import DoesNotFit, WrongUsage

if TYPE_CHECKING:
    from serve.engine import EmbeddingModel

DEFAULT = "all-minilm-l6-v2"


def embed(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts. Without any, each line piped in is one."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="ID",
            help="An embedding model of `pellucid models`, or NAME=PATH for a folder.",
        ),
    ] = DEFAULT,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut the end off a text that is too long.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a matrix for NumPy to this file.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto for the faster good one.")
    ] = "auto",
    stats: Annotated[
        bool, typer.Option("--stats", help="Print speed and counts to stderr.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn texts into vectors."""
    lines = list(texts) if texts else _lines()
    if not lines:
        raise WrongUsage("there is no text: give some as arguments, or pipe lines in")
    if output is not None and output.suffix != ".npy":
        raise WrongUsage(f"{output}: the name of a NumPy file ends in .npy")
    served = _loaded(model, dtype)
    started = time.perf_counter()
    ids = [served.words.encode(text) for text in lines]
    for number, found in enumerate(ids):
        if len(found) > served.context:
            if not truncate:
                raise DoesNotFit(
                    f"text {number + 1} has {len(found)} tokens, {served.id} reads "
                    f"{served.context}: shorten it, or let --truncate cut its end off"
                )
            ids[number] = [*found[: served.context - 1], served.words.sep_id]
    vectors = served.embed_now(ids)
    seconds, tokens = time.perf_counter() - started, sum(map(len, ids))
    if output is not None:
        import numpy as np

        np.save(output, vectors)
        terminal.say(f"{output}: {len(vectors)} x {vectors.shape[1]}, float32")
    if json:
        terminal.answer_json(_as_response(served.id, vectors.tolist(), tokens))
    elif output is None:
        for vector in vectors:
            terminal.answer(" ".join(f"{x:.7g}" for x in vector.tolist()))
    if stats:
        terminal.say(
            f"[{len(lines)} texts · {tokens} tokens · {len(lines) / seconds:.0f} texts/s · "
            f"{tokens / seconds:.0f} tok/s · {served.format}]"
        )


def _loaded(name: str, dtype: str) -> "EmbeddingModel":
    from serve import local, offers
    from serve.engine import load_embedder

    place = local.located(name)
    if not offers.is_encoder(place):
        raise WrongUsage(f"{place.id} does not make embeddings: {DEFAULT} does")
    with local.loading(place):
        return load_embedder(
            place.id, place.path, owned_by=place.publisher, dtype=dtype, notify=terminal.say
        )


def _lines() -> list[str]:
    """The lines of what is piped in; a terminal is not read."""
    if sys.stdin is None or sys.stdin.isatty():
        return []
    try:
        return sys.stdin.buffer.read().decode().splitlines()
    except UnicodeDecodeError as error:
        raise WrongUsage(f"stdin is not UTF-8, from byte {error.start} on") from None


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
