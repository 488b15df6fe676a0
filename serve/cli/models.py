"""`pellucid models`: lists catalogue models, models pulled from the hub, and fine-tuned models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from serve import settings
from serve.cli import check_model, console
from serve.cli.options import Json
from serve.exceptions import Corrupt
from serve.models import adapters, benchmarks, catalogue, generation_config, hub

ModelRow = dict[str, Any]  # a model as `--json` prints it


app = typer.Typer(invoke_without_command=True)
app.command()(check_model.check)


@app.callback()
def models(ctx: typer.Context, json: Json = False) -> None:
    """List the models with their size, memory, speed and licence."""
    if ctx.invoked_subcommand is not None:
        return
    home, config = settings.data_folder(), settings.config_folder()
    known_models = catalogue.load(config)
    speeds = benchmarks.read(home)
    rows = [_catalogue_row(model, known_models) for model in known_models.models.values()]
    rows += [_hub_row(record) for record in hub.records(home)]
    rows += [_adapter_row(adapter, rows) for adapter in adapters.list_metadata(home)]
    for row in rows:
        run = speeds.get(row["id"])
        row["memory"] = run["memory"] if run else None
        row["tokens_per_second"] = run["tokens_per_second"] if run else None
    if json:
        console.write_json({"home": str(home), "default": known_models.default, "models": rows})
        return
    head = ("ID", "SIZE", "MEMORY", "CONTEXT", "LICENCE", "HERE", "TOK/S", "GOOD AT", "SAMPLING")
    print(console.table(head, [_table_row(row, known_models.default) for row in rows]))
    console.info(
        "* the default model. MEMORY is that of weights and KV cache; ~ marks an estimate for "
        "float32 weights. MEMORY and TOK/S are measured when the model generates at least "
        f"{benchmarks.MIN_TIMED_TOKENS} tokens. SAMPLING applies to requests without sampling "
        "options.\n"
        f"Models are stored in {home}. Put your own models.toml in {config}."
    )


def _table_row(row: ModelRow, default: str) -> tuple[str, ...]:
    """Return the cells of a model in the table."""
    from serve.models.disk import human_size

    memory = "-"
    if row["memory"]:
        memory = human_size(row["memory"])
    elif row["parameters"]:
        memory = "~" + human_size(4 * row["parameters"])
    return (
        row["id"] + (" *" if row["id"] == default else ""),
        human_size(row["size"]),
        memory,
        f"{row['context']:,}" if row["context"] else "-",
        row["licence"] or "-",
        row["state"],
        f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else "-",
        row["good_at"],
        generation_config.format_params(row["sampling"]) if row["sampling"] else "-",
    )


def _catalogue_row(model: catalogue.CatalogueEntry, known_models: catalogue.Catalogue) -> ModelRow:
    """Return the fields of a catalogue model, as `pellucid models --json` prints them."""
    from serve.models import download

    try:
        path = download.find_path(model, settings.data_folder())
        state = "pulled" if path else "-"
    except Corrupt:
        path, state = None, "changed"
    return {
        "id": model.id,
        "serves": model.serves,
        "size": model.size,
        "parameters": model.parameters,
        "context": model.context,
        "publisher": model.publisher,
        "licence": model.licence,
        "good_at": model.good_at,
        "sampling": _sampling(model.sampling, path) if model.kind == "decoder" else None,
        "state": state,
        "path": str(path) if path else None,
        "aliases": [name for name, id in known_models.aliases.items() if id == model.id],
    }


def _hub_row(record: hub.Record) -> ModelRow:
    """Return the fields of a model pulled from the hub; fields without a known value are None."""
    unknown: ModelRow = dict.fromkeys(("serves", "parameters", "context", "licence", "sampling"))
    return {
        **unknown,
        "id": record.id,
        "size": record.size,
        "publisher": record.publisher,
        "good_at": f"{record.name}, commit {record.commit[:8]}",
        "commit": record.commit,
        "state": "pulled" if record.is_complete else "changed",
        "path": str(record.path),
        "aliases": [],
    }


def _adapter_row(adapter: adapters.AdapterMetadata, rows: list[ModelRow]) -> ModelRow:
    """Return the fields of a fine-tuned model; those not set here are copied from its base model.

    Args:
        adapter: the metadata of the fine-tuned model.
        rows: the rows of the catalogue and of the hub, to look up the base model.
    """
    unknown: ModelRow = dict.fromkeys(("serves", "parameters", "context", "licence"))
    base = next((row for row in rows if row["id"] == adapter.base), None) or {
        **unknown,
        "sampling": _sampling({}, Path(adapter.path)),
    }
    path = adapters.adapter_folder(settings.data_folder(), adapter.id)
    return {
        **base,
        "id": adapter.id,
        "base": adapter.base,
        "size": sum(file.stat().st_size for file in path.iterdir()),
        "publisher": "local",
        "good_at": f"fine-tuned from {adapter.base}",
        "state": "made",
        "path": str(path),
        "aliases": [],
    }


def _sampling(entry: Mapping[str, float], path: Path | None) -> dict[str, Any]:
    """Return the default sampling parameters of a model.

    Args:
        entry: the `sampling` of its entry in the catalogue; empty without an entry.
        path: its GGUF file or folder, if it was pulled.
    """
    return generation_config.resolve_params(
        {}, generation_config.read_defaults(entry, path, console.info)
    )
