"""`pellucid serve`: serves models over HTTP until Ctrl-C."""

import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serve import settings
from serve.api.settings import ServerSettings, allowed_hosts
from serve.cli import console, embed
from serve.cli.options import Json, model_option
from serve.exceptions import DoesNotFit, Unusable, WrongUsage
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
            "A model to serve: an id of `pellucid models`, NAME=PATH for a GGUF file or a Hugging "
            "Face folder, or hf:OWNER/REPO[@REVISION][:FILE]. Repeatable."
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="PELLUCID_API_KEY",
            help="Require this key. Repeatable; in the variable, separated by spaces.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Another host name to accept in requests. Repeatable."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web origin whose pages may send requests. Repeatable."),
    ] = None,
    cache_mb: Annotated[
        int,
        typer.Option(min=1, help="Memory for the KV cache of each loaded model, in MB."),
    ] = 256,
    memory_mb: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Memory for all loaded models and their KV caches, in MB; the least recently used "
            "model is unloaded first. [default: the free memory]",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, int8, int4, or auto for the fastest accurate one."),
    ] = "auto",
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        typer.Option(
            help="Sampling parameters of a request that sets none: those of the model, or those "
            "of OpenAI (temperature 1)."
        ),
    ] = "model",
    max_embedding_tokens: Annotated[
        int | None, typer.Option(metavar="N", help=embed.MAX_TOKENS_HELP)
    ] = None,
    rate_limit: Annotated[
        int, typer.Option(min=0, help="Requests per minute of each key or address; 0: no limit.")
    ] = 0,
    answer_timeout: Annotated[
        float, typer.Option(help="Maximum time to compute an answer, in seconds.")
    ] = 600.0,
    allow_pull: Annotated[
        bool,
        typer.Option(
            "--allow-pull",
            help="Let requests pull models of the catalogue and of the Hugging Face Hub.",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse requests with a field that has no effect, instead of naming it in the "
            "header x-pellucid-ignored.",
        ),
    ] = False,
    no_store: Annotated[
        bool,
        typer.Option("--no-store", help="Store no responses, conversations or chat completions."),
    ] = False,
    store_mb: Annotated[
        int, typer.Option(min=1, help="Stored responses in MiB; the oldest are deleted first.")
    ] = 256,
    store_days: Annotated[
        float, typer.Option(min=0, help="Days after which stored responses are deleted.")
    ] = 30.0,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Log as text lines, or as JSON objects.")
    ] = "text",
    json: Json = False,
) -> None:
    """Serve models over OpenAI's API until Ctrl-C."""
    try:
        server_settings = ServerSettings(
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
            allow_pull=allow_pull,
            is_strict=strict,
            store_responses=not no_store,
            max_stored_bytes=store_mb * 2**20,
            max_stored_days=store_days,
        )
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    from serve.api import server

    with server.bind_socket(server_settings.host, server_settings.port) as listener:
        known_models = catalogue.load(settings.config_folder())
        models = _locate_models(model or [known_models.default])
        with _open_registry(
            models,
            server_settings,
            dtype,
            known_models,
            serve_pulled=not model or allow_pull,
            sampling_defaults=sampling_defaults,
        ) as registry:
            drained = _run(server_settings, registry, listener, log_format, json=json)
    if not drained:
        raise typer.Exit(130)


def _locate_models(names: Sequence[str]) -> "list[ModelFiles]":
    """Return the models that `--model` options name; download them if needed.

    Raises:
        WrongUsage: a model is fine-tuned, or is named twice.
        Failure: as in `local.locate_model`.
    """
    from serve.cli import local

    models = [local.locate_model(name) for name in names]
    if adapted := [files.id for files in models if files.adapter]:
        raise WrongUsage(
            f"--model {adapted[0]} is a fine-tuned model: pass its base model, and both are served"
        )
    if len({files.id for files in models}) < len(models):
        raise WrongUsage(
            f"--model names a model twice: {', '.join(files.id for files in models)}; remove one"
        )
    return models


@contextlib.contextmanager
def _open_registry(
    models: "list[ModelFiles]",
    server_settings: ServerSettings,
    dtype: str,
    known_models: catalogue.Catalogue,
    *,
    serve_pulled: bool,
    sampling_defaults: generation_config.DefaultsSource = "model",
) -> "Iterator[Registry]":
    """Open the registry of a server with its first model loaded; at the end cancel all requests.

    Args:
        models: the models to serve.
        server_settings: the settings of the server.
        dtype: as in `LoadOptions`.
        known_models: the catalogue.
        serve_pulled: whether to serve all other pulled models too, including those that are pulled
            while the server runs.
        sampling_defaults: as in `LoadOptions`.
    """
    from serve.cli import local
    from serve.exceptions import CannotLoad
    from serve.models import resolve
    from serve.models.registry import Registry
    from serve.models.spec import LoadOptions

    options = LoadOptions(
        cache_budget=server_settings.cache_budget,
        dtype=dtype,
        home=server_settings.home,
        notify=console.info,
        memory_limit=server_settings.memory_limit,
        sampling_defaults=sampling_defaults,
        max_embedding_tokens=server_settings.max_embedding_tokens,
    )
    specs = []
    for files in models:
        with local.report_load_errors(files):
            specs.append(resolve.describe(files, options))
    paths = {files.id: files.path for files in models}
    registry = Registry(
        specs,
        known_models.aliases,
        patterns=known_models.patterns,
        memory_limit=server_settings.memory_limit,
        tools_model=known_models.tools,
        not_pulled=known_models.models if serve_pulled else (),
        adapter_specs=resolve.AdapterSpecs(
            server_settings.home, server_settings.cache_budget, paths
        ),
        pulled_specs=resolve.PulledSpecs(known_models, options, paths) if serve_pulled else None,
    )
    try:
        registry.load(registry.default)
        yield registry
    except CannotLoad as error:
        kind = DoesNotFit if isinstance(error.__cause__, MemoryError | None) else Unusable
        raise kind(str(error)) from None
    finally:
        registry.close(local.STOP_SECONDS)


def _run(
    server_settings: ServerSettings,
    registry: "Registry",
    listener: socket.socket,
    log_format: "LogFormat",
    *,
    json: bool,
) -> bool:
    """Serve until Ctrl-C; return whether all running requests were finished."""
    from serve.api import server
    from serve.api.app import create_app
    from serve.cli.banner import banner

    address = server.url_of(listener)

    def ready() -> None:
        text = banner(address, registry, has_keys=server_settings.requires_key)
        print(text, file=sys.stderr, flush=True)
        if json:
            models = [model.id for model in registry.list_models()]
            dtypes = {served.id: served.dtype for served in registry.loaded()}
            console.write_json({"url": address, "models": models, "formats": dtypes})

    def stopping() -> None:
        console.info(
            f"stopping after the running requests, in at most {server.DRAIN_SECONDS} s "
            "(Ctrl-C again to stop at once)"
        )

    app = create_app(server_settings, registry)
    # Closing the job runner saves the running job, which the next server resumes; then its store.
    with contextlib.closing(app.state.store), contextlib.closing(app.state.job_runner):
        return server.run(app, listener, log_format=log_format, on_ready=ready, on_stop=stopping)
