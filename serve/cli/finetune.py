"""`pellucid finetune`: look at a file, learn from it, watch, list and cancel jobs, delete models.

Jobs are of this machine's data folder, which its servers share: what is made here a server lists,
and serves as soon as it is done. Where no server works on them, `create` and `follow` do, and stay
until it is done. With `--host` a server is asked instead, over its API.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol
from urllib.parse import unquote

import typer

from serve import settings
from serve.cli import console
from serve.cli.options import Json, model_option
from serve.exceptions import CheckFailed, Failure, NotFound, WrongUsage

if TYPE_CHECKING:
    from serve.jobs.jobs import Jobs
    from serve.models.spec import ModelFiles

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
NICENESS = 5  # of what is trained here: somebody waits for it, and nobody else
AUTO = "[default: auto]"
LATER = "`pellucid finetune follow {0}` goes on, `pellucid finetune cancel {0}` ends it"
UNTIL_TOLD = 0.25  # seconds between two looks


def _number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """What reads a hyperparameter: a number, or "auto", which is None."""

    def read(text: str) -> Any:
        if text == "auto":
            return None
        with contextlib.suppress(ValueError):
            if least <= (number := kind(text)) <= most:
                return number
        raise typer.BadParameter(f"{text!r} is neither 'auto' nor from {least:g} to {most:g}")

    return read


class Desk(Protocol):
    """Where jobs are asked for: here, or at a server. Jobs are as the API shows them."""

    where: str  # that a job is

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict: ...
    def jobs(self) -> list[dict]: ...
    def models(self) -> frozenset[str]: ...
    def job(self, id: str) -> dict: ...
    def cancel(self, id: str) -> dict: ...
    def delete(self, name: str) -> list[str]: ...
    def without_follow(self, id: str) -> str: ...
    def events(self, id: str) -> Iterator[dict]: ...
    def leave(self, id: str) -> None: ...
    def hint(self, model: str) -> str: ...


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON lines: chats, or prompts and completions.")],
    model: ModelName = None,
    mend: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what can be mended into this file.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each problem, and one for all.")
    ] = False,
) -> None:
    """Say what is wrong with a file of examples, line by line."""
    from training.__main__ import main

    if not file.is_file():
        raise NotFound(f"there is no file {file}")
    arguments = ["check", str(file), "--model", str(_decoder(model).path)]
    arguments += ["--mend", str(mend)] if mend else []
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
        typer.Option("--n-epochs", "--epochs", parser=_number(int, 1, 50), help=AUTO, metavar="N"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(parser=_number(int, 1, 256), help=AUTO, metavar="N")
    ] = None,
    learning_rate_multiplier: Annotated[
        float | None, typer.Option(parser=_number(float, 1e-6, 1e6), help=AUTO, metavar="X")
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
    with _desk(host) as desk:
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
        console.say(f"{job['id']}, {desk.where}")
        if not follow:
            console.say(desk.without_follow(job["id"]))
        if follow or host is None:  # nobody else may be there to work
            _follow(desk, job["id"], json=json, quiet=not follow)
        elif json:
            console.answer_json(job)
        else:
            console.answer(job["id"])


@app.command()
def follow(job: JobId, host: Host = None, json: Json = False) -> None:
    """Show what a job learns, until it is over; here, also go on with one that was stopped."""
    with _desk(host) as desk:
        _follow(desk, job, json=json, quiet=False)


@app.command("list")
def list_(host: Host = None, json: Json = False) -> None:
    """List the jobs, newest first."""
    with _desk(host) as desk:
        jobs = desk.jobs()
        models = desk.models() if not json else frozenset()
    if json:
        console.answer_json({"jobs": jobs})
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
    console.answer(console.table(("JOB", "STATUS", "MODEL", "MADE", "RESULT"), rows))


def _result(job: dict, models: Collection[str]) -> str:
    """What came of a job, in a few words."""
    if (model := job["fine_tuned_model"]) is None:
        return (job["error"] or {}).get("message", "")[:60] or "-"
    return model if model in models else f"{model} (deleted)"


@app.command()
def cancel(job: JobId, host: Host = None, json: Json = False) -> None:
    """Stop a job."""
    with _desk(host) as desk:
        found = desk.cancel(job)
    if json:
        console.answer_json(found)
    else:
        console.answer(f"{found['id']} {found['status']}")


@app.command()
def delete(
    name: Annotated[
        str, typer.Argument(metavar="JOB|MODEL", help="A job that is over: its model.")
    ],
    host: Host = None,
    json: Json = False,
) -> None:
    """Delete a model that was fine-tuned, with its checkpoints."""
    with _desk(host) as desk:
        deleted = desk.delete(name)
    if json:
        console.answer_json({"deleted": deleted})
    else:
        console.answer("\n".join(deleted))


def _follow(desk: Desk, id: str, *, json: bool, quiet: bool) -> None:
    """Shows a job's events until it is over, and then what came of it.

    Raises:
        CheckFailed: its files cannot be learned from.
        Failure: it failed otherwise, or was cancelled.
    """
    with contextlib.closing(_Loss()) as loss:
        try:
            for event in desk.events(id):
                if event["level"] != "error" and (event["level"] == "warn" or not quiet):
                    loss.show(event)  # an error is the job's, which is said below
        except KeyboardInterrupt:
            loss.close()
            desk.leave(id)
            raise
    job = desk.job(id)
    if job["status"] == "failed":
        raised = CheckFailed if job["error"]["code"].startswith("invalid_") else Failure
        raise raised(job["error"]["message"])
    if job["status"] == "cancelled":
        raise Failure(f"{id} was cancelled")
    if json:
        console.answer_json(job)
    else:
        console.answer(job["fine_tuned_model"])
        console.say(desk.hint(job["fine_tuned_model"]))


class _Loss:
    """What happens, on stderr: on a terminal steps go by on one line, else every tenth is kept."""

    def __init__(self) -> None:
        self._is_live = not console.is_plain(sys.stderr)
        self._tenth, self._is_open = -1, False

    def show(self, event: dict) -> None:
        line, data = event["message"], event.get("data") or {}
        if (step := data.get("step")) is None:
            self.close()
            console.say(line)
            return
        total = data.get("total_steps")
        tenth = step * 10 // total if total else step
        if self._is_live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        elif tenth != self._tenth or "valid_loss" in data:
            self._tenth = tenth
            console.say(line)

    def close(self) -> None:
        if self._is_open:
            print(file=sys.stderr)
            self._is_open = False


# --- here -----------------------------------------------------------------------------------------


def _decoder(name: str | None) -> "ModelFiles":
    """The files of a model that generates text.

    Raises:
        Failure: what `local.of_kind` raises.
    """
    from serve.cli import local

    return local.of_kind(name, "decoder", "only models that do can be fine-tuned")


@contextlib.contextmanager
def _desk(host: str | None) -> Iterator[Desk]:
    if host is not None:
        from serve.cli.remote import remote

        with remote(host, os.environ.get("PELLUCID_API_KEY", "").partition(" ")[0]) as desk:
            yield desk
        return
    from serve.jobs.jobs import Jobs
    from serve.jobs.store import Store

    home = settings.data_folder()
    with contextlib.closing(Store(home)) as store, contextlib.closing(Here(Jobs(store, home))) as d:
        yield d


class Here:
    """The jobs of this machine's data folder, with the files and the models that are here.

    Args:
        jobs: of that folder.
    """

    where = "on this machine"

    def __init__(self, jobs: "Jobs"):
        from serve.jobs.runner import Keeper

        self._jobs, self._keeper = jobs, Keeper(jobs, NICENESS)

    def close(self) -> None:
        """Stops what this process trains."""
        self._keeper.close()

    def create(self, model: str | None, data: Path, valid: Path | None, **fields: Any) -> dict:
        from serve.jobs.jobs import check_name, check_suffix, shown

        place = _decoder(model)
        if place.adapter is not None:
            raise WrongUsage(f"{place.id} was fine-tuned already: begin with its base")
        try:
            check_name(place.id)
            if fields["suffix"] is not None:
                check_suffix(place.id, fields["suffix"])
        except ValueError as error:
            raise WrongUsage(str(error)) from None
        warnings = self._look(place, data, valid)
        files = [None if path is None else self._kept(path) for path in (data, valid)]
        job = self._jobs.create(
            model=place.id,
            path=place.path,
            training_file=str(files[0]),
            validation_file=files[1],
            is_checked=True,
            warnings=warnings,
            **fields,
        )
        return shown(job)

    def _look(self, place: "ModelFiles", data: Path, valid: Path | None) -> list[str]:
        """Check the files; return warnings.

        Raises:
            CheckFailed: training on one of them is impossible.
        """
        from serve.cli import local
        from serve.jobs import validate

        with local.loading(place):
            reports = validate.reports(place.path, data, valid)
        for report in reports.values():
            if report.ok:
                continue
            first, more = report.problems[0], report.counts.total() - 1
            place_of = f"{report.path}:{first.line}" if first.line else report.path
            rest = f" ({more} more: `pellucid finetune check {report.path}` lists them)"
            raise CheckFailed(f"{place_of}: {first.message}{rest if more else ''}")
        return validate.warnings(reports)

    def _kept(self, path: Path) -> str:
        """Uploads a file, so to speak; gives its id."""
        from serve.jobs.store import file_record, new_id

        id = new_id("file-")
        with self._jobs.store.receiving(id) as incoming, path.open("rb") as file:
            while data := file.read(2**20):
                incoming.write(data)
            incoming.keep(file_record(id, path.name, incoming.size, "fine-tune"))
        return id

    def jobs(self) -> list[dict]:
        from serve.jobs.jobs import UNFINISHED, shown
        from serve.jobs.process import Process
        from serve.jobs.runner import is_kept

        found, _ = self._jobs.store.page("job", newest_first=True)
        for job in found:
            if job["status"] not in UNFINISHED or is_kept(self._jobs):
                continue
            if Process.left_behind(job["id"], self._jobs.folder(job["id"])) is None:
                job["status"] = "stopped"  # nobody works on it; whoever follows it will
        return [shown(job) for job in found]

    def models(self) -> frozenset[str]:
        from serve.models import adapters

        return frozenset(map(unquote, adapters.names(self._jobs.home)))

    def job(self, id: str) -> dict:
        from serve.jobs.jobs import shown

        if (job := self._jobs.get(id)) is None:
            raise NotFound(f"there is no job {id}: `pellucid finetune list` shows those there are")
        return shown(job)

    def cancel(self, id: str) -> dict:
        from serve.jobs.jobs import JobIsOver, shown
        from serve.jobs.process import Process

        status = self.job(id)["status"]
        try:
            job = self._jobs.cancel(id)
        except JobIsOver:
            raise Failure(f"{id} is over: it {status}") from None
        # Whoever keeps it stops its process; but that may be one which a killed server left.
        if (left := Process.left_behind(id, self._jobs.folder(id))) is not None:
            left.stop()
        self._jobs.clear(id)
        return shown(job)

    def delete(self, name: str) -> list[str]:
        from serve.jobs.jobs import check_is_over

        model, job = name, self._jobs.get(name)
        if job is not None:
            check_is_over(job)
            model = job["name"]
        if deleted := self._jobs.delete_model(model):
            return deleted
        if job is not None:
            raise NotFound(f"there is no model of {name}: it {job['status']}, or was deleted")
        raise NotFound(f"no model {name} was made here: `pellucid finetune list` shows them")

    def without_follow(self, id: str) -> str:
        return (
            f"it learns until it is done; --follow shows how. Ctrl-C stops it ({LATER.format(id)})"
        )

    def leave(self, id: str) -> None:
        from serve.jobs.process import Process
        from serve.jobs.runner import is_kept

        console.say(f"\nstopping {id} ...")
        self._keeper.close()
        others = is_kept(self._jobs) or Process.left_behind(id, self._jobs.folder(id)) is not None
        state = "goes on: another process here works on it" if others else "is stopped and saved"
        console.say(f"{id} {state} ({LATER.format(id)})")

    def hint(self, model: str) -> str:
        return f"ask it: pellucid chat -m {model} (any server here offers it, too)"

    def events(self, id: str) -> Iterator[dict]:
        from serve.jobs.jobs import OVER

        self._keeper.wake()
        after = None
        while True:
            status = self.job(id)["status"]  # before its events: the last ones come before its end
            found, _ = self._jobs.store.page("event", parent=id, after=after)
            yield from found
            after = found[-1]["id"] if found else after
            if status in OVER:
                return
            time.sleep(UNTIL_TOLD)
