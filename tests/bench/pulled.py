"""Paths of pulled models, for benchmarks that are started without a path."""

from pathlib import Path


def pulled_path(id: str) -> Path:
    """Return the path of a pulled model; raise SystemExit if it is not downloaded."""
    from serve import settings
    from serve.models import catalogue, download

    path = download.find_path(catalogue.load().models[id], settings.data_folder())
    if path is None:
        raise SystemExit(f"this needs a model: run `pellucid pull {id}` first")
    return path
