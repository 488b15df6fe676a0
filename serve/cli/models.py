"""`pellucid models`: the models of the catalogue, and those that were fine-tuned here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve import settings
from serve.cli import console
from serve.cli.options import Json
from serve.exceptions import Corrupt
from serve.models import adapters, benchmarks, catalogue, generation_config

ModelRow = dict[str, Any]  # a model, as `--json` prints it


def models(json: Json = False) -> None:
    """List the models: what they need, how fast they ran."""
    home, config = settings.data_folder(), settings.config_folder()
    known = catalogue.load(config)
    measured = benchmarks.read(home)
    cards = [_catalogue_row(model, known) for model in known.models.values()]
    cards += [_adapter_row(adapter, cards) for adapter in adapters.list_metadata(home)]
    for card in cards:
        run = measured.get(card["id"])
        card["memory"] = run["memory"] if run else None
        card["tokens_per_second"] = run["tokens_per_second"] if run else None
    if json:
        console.write_json({"home": str(home), "default": known.default, "models": cards})
        return
    head = ("ID", "SIZE", "MEMORY", "CONTEXT", "LICENCE", "HERE", "TOK/S", "GOOD AT", "SAMPLING")
    print(console.table(head, [_table_row(card, known.default) for card in cards]))
    console.info(
        "* the default. MEMORY is for weights and conversations as answers here took it; ~ is "
        f"weights in float32, until one of {benchmarks.MIN_TIMED_TOKENS} tokens has measured it and "
        "TOK/S. SAMPLING is for requests that give none.\n"
        f"Models are in {home}, your own models.toml belongs in {config}."
    )


def _table_row(card: ModelRow, default: str) -> tuple[str, ...]:
    """A line of the table."""
    from serve.models.download import human_size

    memory = "-"
    if card["memory"]:
        memory = human_size(card["memory"])
    elif card["parameters"]:
        memory = "~" + human_size(4 * card["parameters"])
    return (
        card["id"] + (" *" if card["id"] == default else ""),
        human_size(card["size"]),
        memory,
        f"{card['context']:,}" if card["context"] else "-",
        card["licence"] or "-",
        card["state"],
        f"{card['tokens_per_second']:.0f}" if card["tokens_per_second"] else "-",
        card["good_at"],
        generation_config.format_params(card["sampling"]) if card["sampling"] else "-",
    )


def _catalogue_row(model: catalogue.CatalogueEntry, known: catalogue.Catalogue) -> ModelRow:
    """The card of a model of the catalogue."""
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
        "aliases": [name for name, id in known.aliases.items() if id == model.id],
    }


def _adapter_row(adapter: adapters.AdapterMetadata, others: list[ModelRow]) -> ModelRow:
    """The card of a model that was fine-tuned here: what it does not say is its base's."""
    unknown: ModelRow = dict.fromkeys(("serves", "parameters", "context", "licence"))
    base = next((other for other in others if other["id"] == adapter.base), None) or {
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


def _sampling(row: Mapping[str, float], path: Path | None) -> dict[str, Any]:
    """The sampling settings of a request that gives none."""
    return generation_config.resolve_params(
        {}, generation_config.read_defaults(row, path, console.info)
    )
