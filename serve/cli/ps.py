"""`pellucid ps`: lists the models in the memory of a running server."""

import time
from typing import Annotated

import typer

from serve.cli import console
from serve.cli.options import DEFAULT_HOST, Json, ServerHost, ServerKey
from serve.models.disk import human_size


def ps(
    host: ServerHost = DEFAULT_HOST,
    key: ServerKey = "",
    all: Annotated[
        bool, typer.Option("--all", help="Also list the models that are not in memory.")
    ] = False,
    json: Json = False,
) -> None:
    """List the models in the memory of a server: memory, time of loading, requests."""
    from serve.cli.remote_backend import open_remote_backend

    with open_remote_backend(host, key) as backend:
        models = backend.model_states()
    models = [model for model in models if all or model["state"] != "unloaded"]
    if json:
        console.write_json({"models": models})
        return
    rows = [
        (
            model["id"],
            model["kind"],
            "busy" if model["busy"] else model["state"],
            human_size(model["memory"]),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(model["loaded_at"]))
            if model["loaded_at"]
            else "-",
            str(model["requests"]),
        )
        for model in models
    ]
    print(console.table(("ID", "KIND", "STATE", "MEMORY", "SINCE", "REQUESTS"), rows))
