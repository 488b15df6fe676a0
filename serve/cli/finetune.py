"""`pellucid finetune`: checks training files, creates, follows and cancels jobs, deletes models.

The command and the servers of this machine share the jobs of the data folder: a server lists a job
that this command creates, and serves the new model as soon as the job is finished. If no server
runs the jobs, `create` and `follow` run them and return when the job is finished. With `--host` the
command uses the API of a server instead.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from serve.cli import console
from serve.cli.options import Json, model_option
from serve.exceptions import CheckFailed, Failure, NotFound

app = typer.Typer(no_args_is_help=True, help="Fine-tune a model on examples.")

Host = Annotated[
    str | None,
    typer.Option(
        envvar="PELLUCID_HOST", metavar="URL", help="Use this server instead of this machine."
    ),
]
JobId = Annotated[
    str, typer.Argument(metavar="JOB", help="The id of a job, as in `pellucid finetune list`.")
]
ModelName = Annotated[
    str | None,
    model_option("The base model. [default: the default model]"),
]
AUTO_HELP = "[default: auto]"


def _number_or_auto(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """Return a parser for a hyperparameter option.

    The parser accepts a number of type `kind` from `least` to `most`, or "auto", which is None.
    """

    def parse(text: str) -> Any:
        if text == "auto":
            return None
        with contextlib.suppress(ValueError):
            if least <= (number := kind(text)) <= most:
                return number
        raise typer.BadParameter(
            f"{text!r} is not a valid value; use 'auto' or a number from {least:g} to {most:g}"
        )

    return parse


class JobBackend(Protocol):
    """Access to the jobs of this machine or of a server. Jobs are dicts in the format of the API.

    Attributes:
        location: where the jobs run, as a phrase: "on this machine", "at http://...".
    """

    location: str

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        """Create a job and return it.

        Args:
            model: the id of the base model; None for the default model.
            data: the training file.
            valid: the validation file, if any.
            fields: `suffix`, `seed`, `n_epochs`, `batch_size` and `learning_rate_multiplier`; None
                for the default.
        """
        ...

    def jobs(self) -> list[dict]:
        """Return all jobs, newest first."""
        ...

    def models(self) -> frozenset[str]:
        """Return the ids of the available models."""
        ...

    def job(self, id: str) -> dict:
        """Return a job; raise `NotFound` if there is none."""
        ...

    def cancel(self, id: str) -> dict:
        """Cancel a job and return it; raise `Failure` if it is already finished."""
        ...

    def delete(self, name: str) -> list[str]:
        """Delete a fine-tuned model, given by its id or its job, and return the deleted ids.

        Raises:
            NotFound: there is no such model.
            Failure: the job is not finished.
        """
        ...

    def detached_hint(self, id: str) -> str:
        """Return the message for a job that was created without `--follow`."""
        ...

    def events(self, id: str) -> Iterator[dict]:
        """Yield the past and the new events of a job until it is finished."""
        ...

    def detach(self, id: str) -> None:
        """Stop following a job, and print whether the job continues."""
        ...

    def usage_hint(self, model: str) -> str:
        """Return the message that tells how to use a fine-tuned model."""
        ...


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON lines: chats, or prompts and completions.")],
    model: ModelName = None,
    fix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a copy with unambiguous problems fixed to FILE."),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print a JSON object for each problem, and a summary."),
    ] = False,
) -> None:
    """Check a file of examples and print its problems line by line."""
    from serve.cli import local
    from training.__main__ import main

    if not file.is_file():
        raise NotFound(f"there is no file {file}")
    arguments = ["check", str(file), "--model", str(local.locate_trainable(model).path)]
    arguments += ["--fix", str(fix)] if fix else []
    raise typer.Exit(main([*arguments, *(["--json"] if json else [])]))


@app.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
def create(
    file: Annotated[Path, typer.Argument(help="JSON lines: chats, or prompts and completions.")],
    model: ModelName = None,
    valid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples for validation.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the name of the new model.")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--n-epochs",
            "--epochs",
            parser=_number_or_auto(int, 1, 50),
            help=AUTO_HELP,
            metavar="N",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(parser=_number_or_auto(int, 1, 256), help=AUTO_HELP, metavar="N")
    ] = None,
    learning_rate_multiplier: Annotated[
        float | None,
        typer.Option(parser=_number_or_auto(float, 1e-6, 1e6), help=AUTO_HELP, metavar="X"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="[default: random]")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the progress of the training.")
    ] = False,
    host: Host = None,
    json: Json = False,
) -> None:
    """Fine-tune a model on a file of examples, and print the name of the new model."""
    for path in filter(None, (file, valid)):
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
    with _open_backend(host) as backend:
        job = backend.create(
            model,
            file,
            valid,
            suffix=suffix,
            seed=seed,
            n_epochs=epochs,
            batch_size=batch_size,
            learning_rate_multiplier=learning_rate_multiplier,
        )
        console.info(f"{job['id']}, {backend.location}")
        if not follow:
            console.info(backend.detached_hint(job["id"]))
        if follow or host is None:  # without a server, this process runs the job
            _follow(backend, job["id"], json=json, quiet=not follow)
        else:
            console.write_result(job, job["id"], json=json)


@app.command()
def follow(job: JobId, host: Host = None, json: Json = False) -> None:
    """Show the progress of a job until it is finished; without --host, resume a stopped job."""
    with _open_backend(host) as backend:
        _follow(backend, job, json=json, quiet=False)


@app.command("list")
def list_(host: Host = None, json: Json = False) -> None:
    """List the jobs, newest first."""
    with _open_backend(host) as backend:
        jobs = backend.jobs()
        models = backend.models() if not json else frozenset()
    if json:
        console.write_json({"jobs": jobs})
        return
    rows = [
        (
            job["id"],
            job["status"],
            job["model"],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"])),
            _result(job, models),
        )
        for job in jobs
    ]
    console.write(console.table(("JOB", "STATUS", "MODEL", "CREATED", "RESULT"), rows))


def _result(job: dict, models: Collection[str]) -> str:
    """Return the RESULT of a job in the table: its model, the start of its error, or "-"."""
    if (model := job["fine_tuned_model"]) is None:
        return (job["error"] or {}).get("message", "")[:60] or "-"
    return model if model in models else f"{model} (deleted)"


@app.command()
def cancel(job: JobId, host: Host = None, json: Json = False) -> None:
    """Cancel a job."""
    with _open_backend(host) as backend:
        cancelled = backend.cancel(job)
    console.write_result(cancelled, f"{cancelled['id']} {cancelled['status']}", json=json)


@app.command()
def delete(
    name: Annotated[
        str,
        typer.Argument(metavar="JOB|MODEL", help="A fine-tuned model, or its finished job."),
    ],
    host: Host = None,
    json: Json = False,
) -> None:
    """Delete a fine-tuned model and its checkpoints."""
    with _open_backend(host) as backend:
        deleted = backend.delete(name)
    console.write_result({"deleted": deleted}, "\n".join(deleted), json=json)


def _follow(backend: JobBackend, id: str, *, json: bool, quiet: bool) -> None:
    """Print the events of a job until it is finished, and then its result.

    Raises:
        CheckFailed: a file cannot be used for training.
        Failure: the job failed for another reason, or was cancelled.
    """
    with contextlib.closing(console.EventPrinter()) as printer:
        try:
            for event in backend.events(id):
                # An event of level "error" repeats the error of the job, which is raised below.
                if event["level"] != "error" and (event["level"] == "warn" or not quiet):
                    printer.show(event)
        except KeyboardInterrupt:
            printer.close()
            backend.detach(id)
            raise
    job = backend.job(id)
    if job["status"] == "failed":
        exception = CheckFailed if job["error"]["code"].startswith("invalid_") else Failure
        raise exception(job["error"]["message"])
    if job["status"] == "cancelled":
        raise Failure(f"the job {id} was cancelled")
    console.write_result(job, job["fine_tuned_model"], json=json)
    if not json:
        console.info(backend.usage_hint(job["fine_tuned_model"]))


@contextlib.contextmanager
def _open_backend(host: str | None) -> Iterator[JobBackend]:
    if host is None:
        from serve.cli.local_backend import open_local_backend

        with open_local_backend() as backend:
            yield backend
    else:
        from serve.cli.remote_backend import open_remote_backend

        key = os.environ.get("PELLUCID_API_KEY", "").partition(" ")[0]
        with open_remote_backend(host, key) as backend:
            yield backend
