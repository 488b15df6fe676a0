"""`pellucid batch`: sends a file of requests to a server as a batch, and fetches the answers.

The server keeps a batch and its answers: the command can be interrupted, and continued with the id
of the batch. Answers go to stdout, or to a file, in the format of OpenAI's output files; failed
requests are named on stderr.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve.cli import console
from serve.cli.options import DEFAULT_HOST, ServerHost, ServerKey
from serve.exceptions import CheckFailed, Failure, NotFound, WrongUsage
from serve.jobs.batches import UNFINISHED

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

    from serve.cli.remote_backend import RemoteBackend

POLL_SECONDS = 0.5


def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|BATCH", help="JSON lines, each a request; or the id of a batch."
        ),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the progress, and write the answers.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the answers here. [default: stdout]"
        ),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write failed requests here. [default: a line each on stderr]"
        ),
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel the batch.")] = False,
    host: ServerHost = DEFAULT_HOST,
    key: ServerKey = "",
) -> None:
    """Answer a file of requests on a server, and print the id of the batch or the answers."""
    from serve.cli.remote_backend import open_remote_backend

    is_file = not source.startswith("batch_") or Path(source).exists()
    if (output or errors) and not follow:
        raise WrongUsage("--output and --errors need --follow, which waits for the answers")
    if cancel and is_file:
        raise WrongUsage(f"--cancel needs the id of a batch, got {source}")
    with open_remote_backend(host, key) as backend:
        id = _create(backend, Path(source)) if is_file else source
        if cancel:
            backend.client.batches.cancel(id)
        if follow:
            console.info(f"{id}, {backend.location}")
            _write_results(backend.client, _follow(backend, id), output, errors)
        elif is_file:
            console.write(id)
        else:
            current = backend.client.batches.retrieve(id)
            console.write(f"{id} {current.status}: {_counts(current)}")


def _create(backend: RemoteBackend, path: Path) -> str:
    """Upload a file, create the batch, and return its id."""
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        endpoint = json.loads(first)["url"]  # that of all lines, as the server checks
    except (ValueError, KeyError, TypeError):
        raise CheckFailed(
            f"{path}: the first line is no request: a line is a JSON object with custom_id, "
            "method, url and body"
        ) from None
    created = backend.client.batches.create(
        input_file_id=backend.upload(path, "batch"), endpoint=endpoint, completion_window="24h"
    )
    return created.id


def _follow(backend: RemoteBackend, id: str) -> Batch:
    """Show the progress of a batch until it is finished, and return it."""
    with contextlib.closing(console.EventPrinter()) as printer:
        try:
            while (current := backend.client.batches.retrieve(id)).status in UNFINISHED:
                if (counts := current.request_counts) is not None and counts.total:
                    step = counts.completed + counts.failed
                    data = {"step": step, "total_steps": counts.total}
                    printer.show({"message": _counts(current), "data": data})
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            printer.close()
            console.info(
                f"\n{id} continues {backend.location}: `pellucid batch {id} --follow` shows it "
                f"again, `pellucid batch {id} --cancel` cancels it (both with the same --host)"
            )
            raise
    return current


def _write_results(
    client: OpenAI, current: Batch, output: Path | None, errors: Path | None
) -> None:
    """Write the results of a finished batch.

    Raises:
        CheckFailed: the server refused lines of the input file.
        Failure: not all requests were answered.
    """
    if current.status == "failed":
        data = (current.errors and current.errors.data) or []
        raise CheckFailed(
            "\n".join(f"line {e.line}: {e.message}" if e.line else str(e.message) for e in data)
        )
    for file_id, path in ((current.output_file_id, output), (current.error_file_id, errors)):
        if file_id is None:
            continue
        with client.files.with_streaming_response.content(file_id) as content:
            if path is not None:
                content.stream_to_file(path)
            elif file_id == current.output_file_id:
                for line in content.iter_lines():
                    console.write(line)
            else:
                for line in content.iter_lines():
                    console.error(_error_text(json.loads(line)))
    counts = current.request_counts
    if current.status != "completed" or (counts is not None and counts.failed):
        raise Failure(f"{current.id} is {current.status}: {_counts(current)}")
    console.info(f"{current.id} is completed: {_counts(current)}")


def _error_text(result: dict) -> str:
    """Return the id and the error message of a request of an error file."""
    error = result["error"] or result["response"]["body"]["error"]
    return f"{result['custom_id']}: {error['message']}"


def _counts(current: Batch) -> str:
    if (counts := current.request_counts) is None:
        return "no requests"
    return f"{counts.completed} of {counts.total} requests answered, {counts.failed} failed"
