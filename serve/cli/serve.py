"""`pellucid serve`: offer models over HTTP until Ctrl-C."""

import contextlib
import socket
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serve import settings
from serve.api.settings import ServerSettings, allowed_hosts
from serve.cli import console, embed
from serve.cli.options import Json, model_option
from serve.exceptions import Corrupt, Failure, WrongUsage
from serve.models import catalogue, generation_config

if TYPE_CHECKING:
    from serve.api.logs import LogFormat
    from serve.models.registry import Registry
    from serve.models.spec import ModelFiles


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.")] = 8000,
    model: Annotated[
        list[str] | None,
        model_option(
            "What to serve: an id of `pellucid models`, or NAME=PATH for a GGUF file or a "
            "Hugging Face folder. Repeatable."
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
        chosen = ServerSettings(
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

    with server.bind_socket(chosen.host, chosen.port) as taken:
        known = catalogue.load(settings.config_folder())
        places = _locate_models(model or [known.default])
        absent: Collection[str] = ()
        if not model:
            places += _locate_other_models(known, places)
            absent = known.models.keys() - {place.id for place in places}
        with _open_registry(
            places, chosen, dtype, known.aliases, absent, sampling_defaults
        ) as registry:
            orderly = _run(chosen, registry, taken, log_format, json=json)
    if not orderly:
        raise typer.Exit(130)


def _locate_models(names: Sequence[str]) -> "list[ModelFiles]":
    """Return the models that `--model` options mean, pulled if they are not here.

    Raises:
        WrongUsage: one was fine-tuned here, or is named twice.
        Failure: what `local.located` raises.
    """
    from serve.cli import local

    places = [local.locate_model(name) for name in names]
    if adapted := [place.id for place in places if place.adapter]:
        raise WrongUsage(f"{adapted[0]} is offered beside its base: serve that one")
    if len({place.id for place in places}) < len(places):
        raise WrongUsage(f"a model is named twice: {', '.join(p.id for p in places)}")
    return places


def _locate_other_models(
    known: catalogue.Catalogue, places: "list[ModelFiles]"
) -> "list[ModelFiles]":
    """The other models of the catalogue that were pulled: offered, and loaded when asked for."""
    from serve.models import download

    found = []
    for model in known.models.values():
        with contextlib.suppress(Corrupt):  # `pellucid models` says which
            place = download.find_pulled(model, settings.data_folder())
            if place and model.id not in [place.id for place in places]:
                found.append(place)
    return found


@contextlib.contextmanager
def _open_registry(
    places: "list[ModelFiles]",
    chosen: ServerSettings,
    dtype: str,
    aliases: Mapping[str, str],
    absent: Collection[str],
    sampling_defaults: generation_config.DefaultsSource = "model",
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
        notify=console.info,
        memory_limit=chosen.memory_limit,
        sampling_defaults=sampling_defaults,
        max_embedding_tokens=chosen.max_embedding_tokens,
    )
    cards = []
    for place in places:
        with local.report_load_errors(place):
            cards.append(resolve.describe(place, options))
    paths = {place.id: place.path for place in places}
    registry = Registry(
        cards,
        aliases,
        memory_limit=chosen.memory_limit,
        not_pulled=absent,
        adapter_specs=resolve.AdapterSpecs(chosen.home, chosen.cache_budget, paths),
    )
    try:
        registry.load(registry.default)
        yield registry
    except CannotLoad as error:
        raise Failure(str(error)) from None
    finally:
        registry.close(local.STOP_SECONDS)


def _run(
    chosen: ServerSettings,
    registry: "Registry",
    taken: socket.socket,
    log_format: "LogFormat",
    *,
    json: bool,
) -> bool:
    """Serve until Ctrl-C. Return whether running answers were finished."""
    from serve.api import server
    from serve.api.app import create_app
    from serve.cli.banner import banner

    address = server.url_of(taken)

    def ready() -> None:
        text = banner(address, registry, has_keys=chosen.requires_key)
        print(text, file=sys.stderr, flush=True)
        if json:
            models = [card.id for card in registry.list_models()]
            formats = {served.id: served.dtype for served in registry.loaded()}
            console.write_json({"url": address, "models": models, "formats": formats})

    def stopping() -> None:
        console.info(
            f"stopping after the running answers, at most {server.DRAIN_SECONDS} s "
            "(Ctrl-C again: at once)"
        )

    app = create_app(chosen, registry)
    with contextlib.closing(app.state.keeper):  # a job that runs is saved, to go on later
        return server.run(app, taken, log_format=log_format, on_ready=ready, on_stop=stopping)
