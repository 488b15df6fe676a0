"""The `pellucid` command: serve, keys, chat, complete, tokenize, models, pull.

Answers go to stdout and everything else to stderr; `--json` makes the answer one JSON object; exit
codes are those of `exceptions.py`. A command imports what is heavy when it runs: help is immediate.
"""

import contextlib
import io
import os
import stat
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core

from serve import settings
from serve.api.settings import Settings, allowed_hosts
from serve.cli import bench, console, embed, finetune, image, inspect_model, keys, transcribe
from serve.exceptions import Corrupt, Failure, NotFound, WrongUsage
from serve.models import adapters, benchmarks, catalogue, sampling

if TYPE_CHECKING:
    from serve.cli import talk
    from serve.models.decoder import ServedModel
    from serve.models.registry import Registry
    from serve.models.spec import ModelFiles

STOP_SECONDS = 5.0  # for the engines to finish the step they are in

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID",
        help="A model of `pellucid models`, or NAME=PATH for a GGUF file or a Hugging Face folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 for the likeliest token. [default: the model's]")
]
TopP = Annotated[float | None, typer.Option(help="Keep this much probability, likeliest first.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer. Repeatable.")]
Stats = Annotated[bool, typer.Option("--stats", help="Print speed and counts to stderr.")]


class Commands(typer.core.TyperGroup):
    """The group of all commands, which turns what goes wrong in one into its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (Failure, catalogue.CatalogueError) as error:
            console.complain(str(error))
            raise typer.Exit(getattr(error, "exit_code", 1)) from None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader has all it wanted. Point stdout elsewhere, or closing it would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:  # names the file: a folder that is not ours, a full disk
            console.complain(str(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="The model stack behind the OpenAI API, from scratch, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys")
app.add_typer(finetune.app, name="finetune")
app.command()(bench.bench)
app.command()(embed.embed)
app.command()(transcribe.transcribe)
app.command()(image.image)
app.command()(inspect_model.inspect)


def main() -> None:
    """The entry point of the `pellucid` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where the locale cannot say a character, an escape is better than a crash.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="pellucid")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"pellucid {version('pellucid')}")
        except PackageNotFoundError:
            print("pellucid, run from its folder without being installed")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.")] = 8000,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="ID",
            help="What to serve: an id of `pellucid models`, or NAME=PATH for a GGUF file or a "
            "Hugging Face folder. Repeatable.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="PELLUCID_API_KEY",
            help="Accept only this key. Repeatable; in the variable, separated by spaces.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name this server may be called by. Repeatable."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web origin whose pages may use this server. Repeatable."),
    ] = None,
    cache_mb: Annotated[
        int,
        typer.Option(min=1, help="Memory for the conversations of each loaded model, in MB."),
    ] = 256,
    memory_mb: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Memory for all loaded models with their conversations, in MB; who was not asked "
            "the longest makes room. [default: what is free]",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Number format of the weights; auto picks the fastest good one.")
    ] = "auto",
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        typer.Option(
            help="Temperature and the like of a request that gives none: the model's own, or "
            "OpenAI's (temperature 1)."
        ),
    ] = "model",
    max_embedding_tokens: Annotated[
        int | None, typer.Option(metavar="N", help=embed.MAX_TOKENS_HELP)
    ] = None,
    rate_limit: Annotated[
        int, typer.Option(min=0, help="Requests a minute for each key or address; 0 for any.")
    ] = 0,
    answer_timeout: Annotated[
        float, typer.Option(help="Longest time for an answer to be computed, in seconds.")
    ] = 600.0,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Lines for people, or objects for programs.")
    ] = "text",
    json: Json = False,
) -> None:
    """Serve models over OpenAI's API until Ctrl-C."""
    try:
        chosen = Settings(
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            allowed_hosts=(*allowed_hosts(host), *(allowed_host or ())),
            allowed_origins=tuple(allowed_origin or ()),
            cache_budget=cache_mb * 2**20,
            memory_limit=None if memory_mb is None else memory_mb * 2**20,
            max_embedding_tokens=max_embedding_tokens,
            requests_per_minute=rate_limit,
            answer_timeout=answer_timeout,
        )
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    from serve.api import server
    from serve.cli import local

    with server.take_port(chosen.host, chosen.port) as taken:
        known = catalogue.load(settings.config_folder())
        places = [local.located(name) for name in model or [known.default]]
        if adapted := [place.id for place in places if place.adapter]:
            raise WrongUsage(f"{adapted[0]} is offered beside its base: serve that one")
        if len({place.id for place in places}) < len(places):
            raise WrongUsage(f"a model is named twice: {', '.join(p.id for p in places)}")
        absent: Collection[str] = ()
        if not model:
            places += _others(known, places)
            absent = known.models.keys() - {place.id for place in places}
        with _offered(places, chosen, dtype, known.aliases, absent, sampling_defaults) as registry:
            from serve.api.app import create_app
            from serve.cli.banner import welcome

            address = server.address(taken)

            def ready() -> None:
                text = welcome(address, registry, has_keys=chosen.asks_for_keys)
                print(text, file=sys.stderr, flush=True)
                if json:
                    models = [card.id for card in registry.list()]
                    formats = {served.id: served.format for served in registry.loaded()}
                    console.answer_json({"url": address, "models": models, "formats": formats})

            def stopping() -> None:
                console.say(
                    f"stopping after the running answers, at most {server.DRAIN_SECONDS} s "
                    "(Ctrl-C again: at once)"
                )

            app = create_app(chosen, registry)
            with contextlib.closing(app.state.keeper):  # a job that runs is saved, to go on later
                orderly = server.run(
                    app, taken, log_format=log_format, ready=ready, stopping=stopping
                )
            if not orderly:
                raise typer.Exit(130)


@app.command()
def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask. Text piped in follows it.")
    ] = None,
    model: ModelName = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
    json: Json = False,
) -> None:
    """Ask one question, or, without one, hold a conversation."""
    from serve.cli import talk

    piped, system = _piped(), _utf8(system)
    question = _joined(prompt, piped.removesuffix("\n") if piped else None)
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if question is None and (json or not at_terminal):
        raise WrongUsage("there is no question: give one as an argument, or pipe one in")
    with _ready(model) as (served, seconds):
        options = _options(temperature, top_p, max_tokens, seed, stop)
        if question is None:
            from serve.cli import repl

            conversation = repl.Conversation(default=options, system=system, stats=stats)

            def figures(reply: "talk.Reply") -> str:
                return _figures(served, reply)

            repl.run(served, conversation, read=_read_line, figures=figures)
            return
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        reply = talk.Reply(served, talk.chat_prompt(served, messages), options)
        _print_reply(served, reply, "chat.completion", seconds, stats=stats, json=json)


@app.command()
def complete(
    text: Annotated[
        str | None, typer.Argument(help="How it begins. Text piped in follows.")
    ] = None,
    model: ModelName = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
    json: Json = False,
) -> None:
    """Go on with a text, without any chat template."""
    from serve.cli import talk

    beginning = _joined(text, _piped())
    if not beginning:
        raise WrongUsage("there is no text to go on with: give it as an argument, or pipe it in")
    with _ready(model) as (served, seconds):
        options = _options(temperature, top_p, max_tokens, seed, stop)
        reply = talk.Reply(served, talk.completion_prompt(served, beginning), options)
        _print_reply(served, reply, "text_completion", seconds, stats=stats, json=json)


@app.command()
def tokenize(
    text: Annotated[
        str | None, typer.Argument(help="Text. Text piped in follows it, byte for byte.")
    ] = None,
    model: ModelName = None,
    special: Annotated[
        bool, typer.Option("--special", help="Read <|special|> tokens as such, not as text.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the tokens a model cuts a text into."""
    piped = _piped()
    if text is None and piped is None:
        raise WrongUsage("there is no text: give it as an argument, or pipe it in")
    whole = (_utf8(text) or "") + (piped or "")
    import bpe
    from serve.cli import local

    place = local.located(model)
    with local.loading(place):
        encoding = bpe.load(place.path).encoding
    allowed = "all" if special else set()
    ids = encoding.encode(whole, allowed_special=allowed, disallowed_special=())
    parts = [encoding.decode_single_token_bytes(id) for id in ids]
    size = len(whole.encode())
    if json:
        tokens = [_token(id, part) for id, part in zip(ids, parts, strict=True)]
        console.answer_json({"model": place.id, "bytes": size, "tokens": tokens})
        return
    print(console.pieces(parts))
    print(*ids)
    console.say(f"{len(ids)} tokens, {size} bytes, {place.id}")


@app.command()
def models(json: Json = False) -> None:
    """List the models: what they need, how fast they ran."""
    home, config = settings.data_folder(), settings.config_folder()
    known = catalogue.load(config)
    here = benchmarks.read(home)
    cards = [_card(model, known, here) for model in known.models.values()]
    cards += [_made_card(card, cards, here) for card in adapters.cards(home)]
    if json:
        console.answer_json({"home": str(home), "default": known.default, "models": cards})
        return
    head = ("ID", "SIZE", "MEMORY", "CONTEXT", "LICENCE", "HERE", "TOK/S", "GOOD AT", "SAMPLING")
    rows = [
        (
            card["id"] + (" *" if card["id"] == known.default else ""),
            _size(card["size"]),
            _memory(card),
            f"{card['context']:,}" if card["context"] else "-",
            card["licence"] or "-",
            card["state"],
            f"{card['tokens_per_second']:.0f}" if card["tokens_per_second"] else "-",
            card["good_at"],
            sampling.text(card["sampling"]) if card["sampling"] else "-",
        )
        for card in cards
    ]
    print(console.table(head, rows))
    console.say(
        "* the default. MEMORY is for weights and conversations as answers here took it; ~ is "
        f"weights in float32, until one of {benchmarks.ENOUGH_TOKENS} tokens has measured it and "
        "TOK/S. SAMPLING is for requests that give none.\n"
        f"Models are in {home}, your own models.toml belongs in {config}."
    )


@app.command()
def pull(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="[default: the chat model]"),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every model of `pellucid models`.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Fetch nothing; hash what is here again, in full.")
    ] = False,
    json: Json = False,
) -> None:
    """Fetch models, checked; print where they are."""
    from serve.models import download, hub

    if all and ids:
        raise WrongUsage("--all already means every model: leave the ids out")
    home = settings.data_folder()
    known = catalogue.load(settings.config_folder())
    done = []
    for id in known.models if all else ids or [known.default]:
        model = known.get(id)
        if id.startswith("hf:") and not verify:
            path = hub.pull(id, home, say=console.say)
        elif model is None:
            raise NotFound(download.unknown(id, known))
        elif verify:
            path = download.verify(model, home)
        else:
            with console.Download(model.id) as progress:
                path = download.pull(model, home, say=console.say, progress=progress)
        done.append({"id": model.id if model else id, "path": str(path)})
    if json:
        console.answer_json({"models": done})
    else:
        for entry in done:
            print(entry["path"])


def _others(known: catalogue.Catalogue, places: "list[ModelFiles]") -> "list[ModelFiles]":
    """The other models of the catalogue that were pulled: offered, and loaded when asked for."""
    from serve.models import download

    found = []
    for model in known.models.values():
        with contextlib.suppress(Corrupt):  # `pellucid models` says which
            place = download.located(model, settings.data_folder())
            if place and model.id not in [place.id for place in places]:
                found.append(place)
    return found


@contextlib.contextmanager
def _offered(
    places: "list[ModelFiles]",
    chosen: Settings,
    dtype: str,
    aliases: Mapping[str, str],
    absent: Collection[str],
    sampling_defaults: sampling.Defaults = "model",
) -> "Iterator[Registry]":
    """The models of a server, the first of them loaded. What runs at the end is cancelled."""
    from serve.cli import local
    from serve.exceptions import CannotLoad
    from serve.models import resolve
    from serve.models.registry import Registry
    from serve.models.spec import LoadOptions

    options = LoadOptions(
        cache_budget=chosen.cache_budget,
        dtype=dtype,
        home=chosen.home,
        notify=console.say,
        memory_limit=chosen.memory_limit,
        sampling_defaults=sampling_defaults,
        max_embedding_tokens=chosen.max_embedding_tokens,
    )
    cards = []
    for place in places:
        with local.loading(place):
            cards.append(resolve.describe(place, options))
    paths = {place.id: place.path for place in places}
    registry = Registry(
        cards,
        aliases,
        memory_limit=chosen.memory_limit,
        absent=absent,
        shelf=resolve.Shelf(chosen.home, chosen.cache_budget, paths),
    )
    try:
        registry.load(registry.default)
        yield registry
    except CannotLoad as error:
        raise Failure(str(error)) from None
    finally:
        registry.close(drain=False, timeout=STOP_SECONDS)


@contextlib.contextmanager
def _loaded(place: "ModelFiles", cache_budget: int) -> Iterator["ServedModel"]:
    """A model and its engine in this process. What still runs at the end is cancelled."""
    from serve.cli import local
    from serve.models import resolve
    from serve.models.decoder import load_model, sampling_of

    with local.loading(place):
        served = load_model(
            place.id,
            place.path,
            owned_by=place.publisher,
            cache_budget=cache_budget,
            sha256=place.model.files[0].sha256 if place.model and place.model.files else None,
            good=place.model.formats if place.model else (),
            sampling=sampling_of(place, console.say),
            notify=console.say,
        )
        if place.adapter is not None:
            served = resolve.adapted(place.adapter, served, place.path)
    try:
        yield served
    finally:
        served.engine.close(drain=False, timeout=STOP_SECONDS)


@contextlib.contextmanager
def _ready(name: str | None) -> Iterator["tuple[ServedModel, float]"]:
    """A model in this process, and the seconds it took to load."""
    from serve.cli import local

    place = local.located(name)
    started = time.perf_counter()
    with _loaded(place, Settings().cache_budget) as served:
        yield served, time.perf_counter() - started


def _options(
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    seed: int | None,
    stop: Sequence[str] | None,
) -> "talk.Options":
    """What the user asked for; the rest is the model's."""
    from serve.cli import talk

    asked = {"temperature": temperature, "top_p": top_p}
    sampling = {name: value for name, value in asked.items() if value is not None}
    if not all(stop or ()):
        raise WrongUsage("--stop is empty: it would end every answer before it begins")
    return talk.Options(sampling=sampling, max_tokens=max_tokens, stop=tuple(stop or ()), seed=seed)


def _print_reply(
    model: "ServedModel",
    reply: "talk.Reply",
    kind: Literal["chat.completion", "text_completion"],
    load_seconds: float,
    *,
    stats: bool,
    json: bool,
) -> None:
    """Prints an answer as it comes, or whole as JSON in the API's shape."""
    from serve.cli import talk

    interrupted = False
    try:
        for text in reply:
            if not json:
                console.answer(text, end="")
    except KeyboardInterrupt:
        interrupted = True  # keep what came
    figures = _figures(model, reply, load_seconds)
    if json:
        console.answer_json(talk.as_response(model, reply, kind))
    else:
        console.answer("")
    if stats:
        console.say(figures)
    if interrupted:
        raise typer.Exit(130)


def _figures(model: "ServedModel", reply: "talk.Reply", load_seconds: float | None = None) -> str:
    """Notes the run's speed for `pellucid models`, and puts it into one line."""
    home = settings.data_folder()
    benchmarks.record(
        home, model.id, tokens=reply.tokens - 1, seconds=reply.decoding, memory=model.memory
    )
    figures = ["in-process"]
    if load_seconds is not None:
        figures.append(f"load {load_seconds:.1f} s")
    if reply.first_token is not None:
        figures.append(f"first token {reply.first_token * 1000:.0f} ms")
    if speed := reply.tokens_per_second:
        figures.append(f"{speed:.0f} tok/s")
    figures += [f"{reply.prompt_tokens} + {reply.tokens} tokens", reply.reason]
    return f"[{' · '.join(figures)}]"


def _piped() -> str | None:
    """What is piped or redirected into this command, or None.

    A terminal is not read here, nor what is neither pipe nor file: a service's closed or idle stdin
    is not a text.
    """
    mode = os.fstat(0).st_mode if sys.stdin else 0
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return None
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise WrongUsage(
            f"stdin is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}"
        ) from None


def _joined(argument: str | None, piped: str | None) -> str | None:
    """The argument first, then what is piped in, with an empty line between."""
    given = [text for text in (_utf8(argument), piped) if text]
    return "\n\n".join(given) if given else None


def _utf8(argument: str | None) -> str | None:
    """An argument, once it is known to be text: Python lets other bytes pass as surrogates."""
    try:
        (argument or "").encode()
    except UnicodeEncodeError as error:
        raise WrongUsage(f"an argument is not UTF-8, from character {error.start} on") from None
    return argument


def _read_line(prompt: str) -> str:
    import readline  # noqa: F401  importing it gives `input` editing and history

    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for the answers
    return input()


def _token(id: int, part: bytes) -> dict[str, Any]:
    try:
        text = part.decode()
    except UnicodeDecodeError:
        text = None  # part of a character
    return {"id": id, "text": text, "bytes": list(part)}


def _size(size: int) -> str:
    from serve.models.download import human_size

    return human_size(size)


def _memory(card: dict[str, Any]) -> str:
    if card["memory"]:
        return _size(card["memory"])
    return "~" + _size(4 * card["parameters"]) if card["parameters"] else "-"


def _card(
    model: catalogue.Model, known: catalogue.Catalogue, here: dict[str, benchmarks.Measured]
) -> dict[str, Any]:
    """What `pellucid models` says of one model."""
    from serve.models import download

    try:
        path = download.find(model, settings.data_folder())
        state = "pulled" if path else "-"
    except Corrupt:
        path, state = None, "changed"
    run = here.get(model.id)
    return {
        "id": model.id,
        "serves": model.serves,
        "size": model.size,
        "parameters": model.parameters,
        "memory": run["memory"] if run else None,
        "context": model.context,
        "publisher": model.publisher,
        "licence": model.licence,
        "good_at": model.good_at,
        "sampling": _sampling(model.sampling, path) if model.kind == "decoder" else None,
        "state": state,
        "path": str(path) if path else None,
        "tokens_per_second": run["tokens_per_second"] if run else None,
        "aliases": [name for name, id in known.aliases.items() if id == model.id],
    }


def _sampling(row: Mapping[str, float], path: Path | None) -> dict[str, Any]:
    """The sampling settings of a request that gives none."""
    return sampling.resolve({}, sampling.of_model(row, path, console.say))


def _made_card(
    card: adapters.Card, others: list[dict[str, Any]], here: dict[str, benchmarks.Measured]
) -> dict[str, Any]:
    """The same of one that was fine-tuned here, of which its base says the rest."""
    base = next((other for other in others if other["id"] == card.base), None) or {}
    path, run = adapters.folder(settings.data_folder(), card.id), here.get(card.id)
    unknown = dict.fromkeys(("serves", "parameters", "context", "licence"))
    return {
        **unknown,
        "sampling": _sampling({}, Path(card.path)) if not base else None,
        **base,
        "id": card.id,
        "base": card.base,
        "size": sum(file.stat().st_size for file in path.iterdir()),
        "memory": run["memory"] if run else None,
        "publisher": "local",
        "good_at": f"fine-tuned from {card.base}",
        "state": "made",
        "path": str(path),
        "tokens_per_second": run["tokens_per_second"] if run else None,
        "aliases": [],
    }
