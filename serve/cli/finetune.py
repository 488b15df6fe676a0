"""`pellucid finetune`: look at a file, learn from it, watch, list and cancel jobs, delete models.

Jobs are of this machine's data folder, which its servers share: what is made here a server lists,
and serves as soon as it is done. Where no server works on them, `create` and `follow` do, and stay
until it is done. With `--host` a server is asked instead, over its API.
"""

import contextlib
import functools
import os
import sys
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
        envvar="PELLUCID_HOST", metavar="URL", help="Ask this server instead of working here."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="As `pellucid finetune list` shows it.")]
ModelName = Annotated[
    str | None,
    model_option("What to begin with. [default: the default]"),
]
AUTO_HELP = "[default: auto]"


def _number_or_auto(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """What reads a hyperparameter: a number, or "auto", which is None."""

    def read(text: str) -> Any:
        if text == "auto":
            return None
        with contextlib.suppress(ValueError):
            if least <= (number := kind(text)) <= most:
                return number
        raise typer.BadParameter(f"{text!r} is neither 'auto' nor from {least:g} to {most:g}")

    return read


class JobBackend(Protocol):
    """Where jobs are asked for: here, or at a server. Jobs are as the API shows them."""

    location: str  # that a job is

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict: ...
    def jobs(self) -> list[dict]: ...
    def models(self) -> frozenset[str]: ...
    def job(self, id: str) -> dict: ...
    def cancel(self, id: str) -> dict: ...
    def delete(self, name: str) -> list[str]: ...
    def detached_hint(self, id: str) -> str: ...
    def events(self, id: str) -> Iterator[dict]: ...
    def detach(self, id: str) -> None: ...
    def usage_hint(self, model: str) -> str: ...


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON lines: chats, or prompts and completions.")],
    model: ModelName = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what can be mended into this file.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each problem, and one for all.")
    ] = False,
) -> None:
    """Say what is wrong with a file of examples, line by line."""
    from serve.cli import local
    from training.__main__ import main

    if not file.is_file():
        raise NotFound(f"there is no file {file}")
    arguments = ["check", str(file), "--model", str(local.locate_trainable(model).path)]
    arguments += ["--mend", str(fix)] if fix else []
    raise typer.Exit(main([*arguments, *(["--json"] if json else [])]))


@app.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
def create(
    file: Annotated[Path, typer.Argument(help="JSON lines: chats, or prompts and completions.")],
    model: ModelName = None,
    valid: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples that are only looked at.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
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
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="[default: any]")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what it learns.")] = False,
    host: Host = None,
    json: Json = False,
) -> None:
    """Make a job of a file of examples, and print the name of what it made."""
    for path in filter(None, (file, valid)):
        if not path.is_file():
            raise NotFound(f"there is no file {path}")
    with _open_backend(host) as desk:
        job = desk.create(
            model,
            file,
            valid,
            suffix=suffix,
            seed=seed,
            n_epochs=epochs,
            batch_size=batch_size,
            learning_rate_multiplier=learning_rate_multiplier,
        )
        console.info(f"{job['id']}, {desk.location}")
        if not follow:
            console.info(desk.detached_hint(job["id"]))
        if follow or host is None:  # nobody else may be there to work
            _follow(desk, job["id"], json=json, quiet=not follow)
        else:
            console.write_result(job, job["id"], json=json)


@app.command()
def follow(job: JobId, host: Host = None, json: Json = False) -> None:
    """Show what a job learns, until it is over; here, also go on with one that was stopped."""
    with _open_backend(host) as desk:
        _follow(desk, job, json=json, quiet=False)


@app.command("list")
def list_(host: Host = None, json: Json = False) -> None:
    """List the jobs, newest first."""
    with _open_backend(host) as desk:
        jobs = desk.jobs()
        models = desk.models() if not json else frozenset()
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
    console.write(console.table(("JOB", "STATUS", "MODEL", "MADE", "RESULT"), rows))


def _result(job: dict, models: Collection[str]) -> str:
    """What came of a job, in a few words."""
    if (model := job["fine_tuned_model"]) is None:
        return (job["error"] or {}).get("message", "")[:60] or "-"
    return model if model in models else f"{model} (deleted)"


@app.command()
def cancel(job: JobId, host: Host = None, json: Json = False) -> None:
    """Stop a job."""
    with _open_backend(host) as desk:
        found = desk.cancel(job)
    console.write_result(found, f"{found['id']} {found['status']}", json=json)


@app.command()
def delete(
    name: Annotated[
        str, typer.Argument(metavar="JOB|MODEL", help="A job that is over: its model.")
    ],
    host: Host = None,
    json: Json = False,
) -> None:
    """Delete a model that was fine-tuned, with its checkpoints."""
    with _open_backend(host) as desk:
        deleted = desk.delete(name)
    console.write_result({"deleted": deleted}, "\n".join(deleted), json=json)


def _follow(desk: JobBackend, id: str, *, json: bool, quiet: bool) -> None:
    """Shows a job's events until it is over, and then what came of it.

    Raises:
        CheckFailed: its files cannot be learned from.
        Failure: it failed otherwise, or was cancelled.
    """
    with contextlib.closing(_EventPrinter()) as loss:
        try:
            for event in desk.events(id):
                if event["level"] != "error" and (event["level"] == "warn" or not quiet):
                    loss.show(event)  # an error is the job's, which is said below
        except KeyboardInterrupt:
            loss.close()
            desk.detach(id)
            raise
    job = desk.job(id)
    if job["status"] == "failed":
        raised = CheckFailed if job["error"]["code"].startswith("invalid_") else Failure
        raise raised(job["error"]["message"])
    if job["status"] == "cancelled":
        raise Failure(f"{id} was cancelled")
    console.write_result(job, job["fine_tuned_model"], json=json)
    if not json:
        console.info(desk.usage_hint(job["fine_tuned_model"]))


class _EventPrinter:
    """What happens, on stderr: on a terminal steps go by on one line, else every tenth is kept."""

    def __init__(self) -> None:
        self._is_live = not console.is_plain(sys.stderr)
        self._tenth, self._is_open = -1, False

    def show(self, event: dict) -> None:
        line, data = event["message"], event.get("data") or {}
        if (step := data.get("step")) is None:
            self.close()
            console.info(line)
            return
        total = data.get("total_steps")
        tenth = step * 10 // total if total else step.bit_length()  # rarer and rarer
        if self._is_live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        elif tenth != self._tenth or "valid_loss" in data:
            self._tenth = tenth
            console.info(line)

    def close(self) -> None:
        if self._is_open:
            print(file=sys.stderr)
            self._is_open = False


@contextlib.contextmanager
def _open_backend(host: str | None) -> Iterator[JobBackend]:
    if host is None:
        from serve.cli.local_backend import open_local_backend as desk
    else:
        from serve.cli.remote_backend import open_remote_backend

        key = os.environ.get("PELLUCID_API_KEY", "").partition(" ")[0]
        desk = functools.partial(open_remote_backend, host, key)
    with desk() as found:
        yield found
