"""`pellucid embed`: computes an embedding vector for each text.

The texts are the arguments, or the lines of stdin. The output has one line per text: the numbers of
its vector, separated by spaces. With `--json` the output is one object in the format of OpenAI's
API. `--output FILE.npy` writes the vectors as one matrix for NumPy instead. A text that exceeds the
maximum length is an error, unless `--long-text-mode` truncates it or averages the vectors of its
chunks.
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
    "Maximum length of a text, in tokens, up to the number of positions of the model: 512 for "
    "all-minilm-l6-v2. [default: the length that the model was trained with, 256]"
)


def embed(
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts. [default: the lines of stdin]"),
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
            help="How to embed a text that exceeds the maximum length: truncate it, or average the "
            "vectors of its chunks."
        ),
    ] = None,
    max_embedding_tokens: Annotated[
        int | None, typer.Option(metavar="N", help=MAX_TOKENS_HELP)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the vectors as one matrix to this .npy file."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto for the faster accurate one.")
    ] = "auto",
    stats: Stats = False,
    json: Json = False,
) -> None:
    """Compute embedding vectors of texts."""
    lines = list(texts) if texts else _stdin_lines()
    if not lines:
        raise WrongUsage("no text; give texts as arguments, or pipe them in, one per line")
    if output is not None and output.suffix != ".npy":
        raise WrongUsage(f"{output}: the name must end in .npy")
    if truncate and long_text_mode == "mean":
        raise WrongUsage("give either --truncate or --long-text-mode mean, not both")
    served = _load_model(model, dtype, max_embedding_tokens)
    import asyncio

    started = time.perf_counter()
    ids = [served.encode(text) for text in lines]
    mode = "truncate" if truncate else long_text_mode
    for number, text_ids in enumerate(ids):
        if len(text_ids) > served.context and mode is None:
            raise DoesNotFit(
                f"text {number + 1} has {len(text_ids)} tokens, but the maximum of {served.id} is "
                f"{served.context}; shorten it, or give --long-text-mode truncate or mean"
            )
    chunks = [
        served.truncate(text_ids, served.context) if mode == "truncate" else served.split(text_ids)
        for text_ids in ids
    ]
    vectors = asyncio.run(served.embed([chunk for text in chunks for chunk in text]))
    vectors = served.average(vectors, chunks)
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

    files = local.locate_model_of_kind(name, "encoder", f"give --model {DEFAULT_MODEL}")
    with local.report_load_errors(files):
        return load_embedding_model(
            files.id,
            files.path,
            owned_by=files.publisher,
            dtype=dtype,
            max_tokens=max_tokens,
            notify=console.info,
        )


def _stdin_lines() -> list[str]:
    """Return the lines of stdin; none if stdin is a terminal."""
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
