"""`pellucid models check`: reports the content of a model's files before it is served."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve import settings
from serve.cli import console
from serve.cli.options import Json
from serve.exceptions import Unusable
from serve.models.disk import human_size

if TYPE_CHECKING:
    from serve.models.spec import Kind


def check(
    path: Annotated[
        Path,
        typer.Argument(help="A GGUF file (the first of a split model) or a Hugging Face folder."),
    ],
    json: Json = False,
) -> None:
    """Check the files of a model: family, tokenizer, memory, and ignored or missing parts."""
    report = check_files(path)
    if json:
        console.write_json({"path": str(path), **report})
        return
    rows = [
        *((name, str(value)) for name, value in report.items() if isinstance(value, str | int)),
        *((f"memory in {dtype}", human_size(size)) for dtype, size in report["memory"].items()),
        *(("ignored", line) for line in report["ignored"]),
        *(("missing", line) for line in report["missing"]),
    ]
    print(console.table(("PROPERTY", "VALUE"), rows))


def check_files(path: Path) -> dict[str, Any]:
    """Return the properties of a model's files, without loading its weights.

    Raises:
        Unusable: A file is damaged or not supported.
    """
    from serve.models import download, kinds

    notes = _LogLines()
    for package in ("bpe", "transformer"):
        logging.getLogger(package).addHandler(notes)
    try:
        path = download.check_local_model(path)
        kind = kinds.recognize(path)
        assert kind is not None  # `check_local_model` has recognized it
        report = _check_decoder(path) if kind.name == "decoder" else _check_other(path, kind)
    except (ValueError, OSError, Unusable) as error:
        raise Unusable(f"{path} cannot be used: {error}") from None
    finally:
        for package in ("bpe", "transformer"):
            logging.getLogger(package).removeHandler(notes)
    report["ignored"] += notes.lines
    return report


class _LogLines(logging.Handler):
    """A log handler that collects the warnings of the loaders, which name ignored keys."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _check_decoder(path: Path) -> dict[str, Any]:
    from serve.models import decoder, dtypes
    from serve.models.catalogue import DTYPES
    from transformer import checkpoint

    header = checkpoint.read_header(path)
    checkpoint.check_tensors(path, header)
    tokenizer = decoder.read_tokenizer(path, header)
    cfg, encoding = header.cfg, tokenizer.encoding
    template = tokenizer.chat_template
    stored = Counter(tensor.dtype for tensor in header.tensors.values())
    missing = []
    if template is None:
        missing.append("chat template: the model serves completions, not chat")
    if path.is_dir() and not (path / "generation_config.json").is_file():
        missing.append("generation_config.json: the sampling defaults are those of OpenAI")
    if not tokenizer.stop_ids:
        missing.append("end token: each answer continues up to the token limit")
    ignored = []
    if cfg.vocab_size > encoding.n_vocab:
        ignored.append(f"{cfg.vocab_size - encoding.n_vocab} embedding rows without a token")
    return {
        "kind": "decoder",
        "family": header.architecture,
        "parameters": cfg.num_params,
        "layers": cfg.num_layers,
        "context": cfg.max_seq_len,
        "tokenizer": f"{type(encoding).__name__}, {encoding.n_vocab} tokens",
        "template": "none" if template is None else "yes",
        "quantization": ", ".join(f"{dtype} ({n} tensors)" for dtype, n in stored.most_common()),
        "memory": {dtype: dtypes.weight_bytes(cfg, dtype) for dtype in DTYPES},
        "ignored": ignored,
        "missing": missing,
    }


def _check_other(path: Path, kind: Kind) -> dict[str, Any]:
    from serve.models.spec import LoadOptions, ModelFiles
    from transformer.checkpoint import gguf
    from transformer.checkpoint.safetensors import read_json_object

    encoder, missing = path / "encoder", []
    if path.is_dir():
        config = path / ("denoiser/config.json" if kind.name == "images" else "config.json")
        family = str(read_json_object(config).get("model_type", "-"))
    else:
        family = str(gguf.read_metadata_head(path).get("general.architecture", "-"))
    report = {"kind": kind.name, "family": family, "memory": {}, "ignored": [], "missing": missing}
    if kind.has_encoder and not encoder.is_dir():
        missing.append("encoder: the text encoder of the catalogue is used")
        return report
    options = LoadOptions(
        cache_budget=0, dtype="auto", home=settings.data_folder(), notify=console.info
    )
    files = ModelFiles("check", path, "local", encoder=encoder if kind.has_encoder else None)
    spec = kind.describe(files, options)
    if spec.context is not None:
        report["context"] = spec.context
    return report | {"memory": {"auto": spec.memory()}}
