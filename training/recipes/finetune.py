"""Fine-tuning a decoder on a file of examples: check it, choose numbers, train, write the result.

    from training.recipes import finetune

    finetune.run(finetune.Settings(model="smollm2.gguf", data="examples.jsonl", out="mine"))

`run` is the recipe; what it leaves in `out`:

    job.json        what "auto" became, and what the data were
    metrics.jsonl   a line a step; loss.png draws it
    checkpoints/    where the loop goes on after a stop
    adapters/       the adapter as it was after each of the last epochs, step-N
    adapter/        the adapter (LoRA), in PEFT's layout; there when all is done
    model/          instead of it, for "full": a model in Hugging Face's layout

Run again in the same folder, it goes on; when all is done, it does nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bpe import formats
from bpe.formats import Tokenizer
from bpe.stop_tokens import read_optional_json
from training import bench, check, loop, packing
from training.check import Report
from training.config import TrainConfig
from training.packing import Batches
from training.recipes import run_dir
from training.recipes.decoder import DecoderTask, LoraTask, cast_params
from transformer import checkpoint, families, lora
from transformer.checkpoint import gguf
from transformer.config import Config as Model

# What a learning_rate_multiplier of 1 means. An adapter begins at nothing and takes larger steps.
LEARNING_RATES = {"lora": 1e-3, "full": 5e-5}
MAX_EPOCH_ADAPTERS = 3  # adapters of epochs


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What there is to choose. None is "auto".

    Raises:
        ValueError: a field is out of range.
    """

    model: Path  # a GGUF file or a Hugging Face folder
    data: Path  # JSON lines; see training/examples.py
    out: Path
    valid: Path | None = None
    method: Literal["lora", "full"] = "lora"
    epochs: int | None = None
    batch_size: int | None = None  # examples a step
    learning_rate_multiplier: float | None = None
    rank: int = 16  # of the adapter
    seed: int = 0
    max_tokens: int | None = None  # of the longest example; auto: 2048, or what the model reads
    format: Literal["float32", "bfloat16"] | None = None  # of products; auto: the faster, here

    def __post_init__(self) -> None:
        for name in ("model", "data", "out", "valid"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(value))
        if self.method not in LEARNING_RATES:
            raise ValueError(f"method must be 'lora' or 'full', got {self.method!r}")
        if self.format not in ("float32", "bfloat16", None):
            raise ValueError(f"format must be 'float32' or 'bfloat16', got {self.format!r}")
        for name in ("epochs", "batch_size", "rank", "max_tokens", "learning_rate_multiplier"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        reason: "signal" if it was told to stop and saved; "refused" if a file cannot be learned
            from: `reports` say why.
        job: what stands in job.json; empty if the data were refused.
        reports: of the training file, and of the validation file if there is one.
        signal: which one told it to stop.
    """

    reason: Literal["finished", "signal", "refused"]
    job: dict[str, Any]
    reports: tuple[Report, ...] = ()
    signal: int | None = None


def run(
    settings: FinetuneConfig,
    *,
    notify: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Result:
    """Fine-tunes, or goes on with it.

    Args:
        say: told a line now and then.
        progress: shows a bar on standard error if that is a terminal.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the model is of an unknown kind, or `out` holds a run with other settings.
        FloatingPointError: the loss is no number any more.
    """
    out, given = settings.out, run_dir.config_record(settings)
    job = run_dir.read_job(out / "job.json", given)
    final = out / ("adapter" if settings.method == "lora" else "model")
    if job is not None and final.exists():
        return Result("finished", job)
    tokenizer, max_tokens = read_tokenizer(settings.model, settings.max_tokens)
    report, examples = check.read_examples(settings.data, tokenizer, max_tokens=max_tokens)
    reports, held_out = [report], []
    if settings.valid is not None:
        other, held_out = check.read_examples(
            settings.valid, tokenizer, max_tokens=max_tokens, kind=report.kind, minimum=1
        )
        reports.append(other)
    if not all(report.ok for report in reports):
        return Result("refused", {}, tuple(reports))
    for checked in reports:
        for warning in checked.warnings:
            notify(f"{checked.path}: {warning.message}")

    if job is None:
        job = {"given": given, **_resolve(settings, report, max_tokens)}
    batches = Batches(
        examples,
        batch_size=job["batch_size"],
        epochs=job["epochs"],
        seed=settings.seed,
        longest=max(map(len, held_out), default=0),
    )
    job |= {"steps": batches.steps, "steps_per_epoch": batches.steps_per_epoch}
    run_dir.write_job(out / "job.json", job)
    rows, width = batches.shape
    notify(
        f"{report.examples} examples, {report.tokens} tokens; {job['epochs']} epochs of "
        f"{batches.steps_per_epoch} steps, each {rows} x {width} tokens, in {job['format']}"
    )

    cfg = checkpoint.read_config(settings.model)
    remat = (
        rows // batches.micro_batches * width > packing.MICRO_BATCH_TOKENS
    )  # one very long example
    task, frozen = _task(settings, job, cfg, remat)
    config = TrainConfig(
        steps=batches.steps,
        learning_rate=job["learning_rate"],
        seed=settings.seed,
        warmup_steps=min(10, batches.steps // 10),
        micro_batches=batches.micro_batches,
        steps_per_epoch=batches.steps_per_epoch,
        validate_every=batches.steps_per_epoch,
        save_every=50 if settings.method == "lora" else 200,  # the state of "full" is gigabytes
        keep=2 if settings.method == "lora" else 1,
    )

    def on_step(state: Any, line: dict[str, Any]) -> None:
        if line["step"] % batches.steps_per_epoch:
            return
        speed = f"{line['tokens_per_second']:.0f} tok/s"
        notify(f"epoch {line['epoch']:.0f}: loss {line['loss']:.4f}, {speed}")
        if settings.method == "lora":
            name = f"step-{line['step']}"
            run_dir.write_dir_atomic(
                out / "adapters" / name,
                lambda folder: _save_adapter(folder, state.weights, cfg, settings),
            )
            _remove_old_adapters(out / "adapters")

    notify("compiling the training step ...")
    outcome = loop.train(
        task,
        frozen,
        batches,
        config,
        out,
        validation_batches=packing.collate_all(held_out, (rows // batches.micro_batches, width)),
        on_step=on_step,
        flops_per_token=task.flops_per_token(report.tokens // report.examples),
        dtype=job["format"],
        progress=progress,
    )
    if outcome.reason == "signal":
        return Result("signal", job, tuple(reports), outcome.signal)
    weights = outcome.state.weights
    if settings.method == "lora":
        run_dir.write_dir_atomic(
            final, lambda folder: _save_adapter(folder, weights, cfg, settings)
        )
    else:
        run_dir.write_dir_atomic(
            final, lambda folder: _save_model(folder, weights, cfg, tokenizer, settings.model)
        )
    return Result("finished", job, tuple(reports))


def _task(settings: FinetuneConfig, job: dict[str, Any], cfg: Model, remat: bool):
    """What is trained, and the weights that stay as they are."""
    params, *_ = checkpoint.load(settings.model)
    if settings.method == "full":
        return DecoderTask(cfg=cfg, init_params=params, dtype=job["format"], remat=remat), None
    adapter = LoraTask(
        cfg=cfg,
        rank=job["rank"],
        alpha=job["alpha"],
        target_modules=lora_target_modules(cfg),
        dtype=job["format"],
        remat=remat,
    )
    return adapter, cast_params(params, job["format"])


def lora_target_modules(cfg: Model) -> tuple[str, ...]:
    """What an adapter adapts: every linear map that PEFT's layout can hold one of.

    GPT-2's files hold queries, keys and values as one matrix, whose adapter would have one A.
    """
    shared = ("q", "k", "v") if families.to_hf(cfg)["model_type"] == "gpt2" else ()
    return tuple(part for part in lora.TARGET_MODULES if part not in shared)


def read_tokenizer(model: Path, max_tokens: int | None = None) -> tuple[Tokenizer, int]:
    """A model's tokenizer, and how many tokens an example for it may have."""
    cfg = checkpoint.read_config(model)
    return formats.load(model), min(max_tokens or 2048, cfg.max_seq_len)


def auto_epochs(examples: int) -> int:
    """How often to read few examples: often, and a large set once."""
    return max(1, min(25, max(3, round(800 / examples)), 25_000 // examples))


def auto_batch_size(examples: int) -> int:
    """A small set is read in small steps, so that there are enough of them."""
    return max(1, min(16, examples // 25))


def _resolve(settings: FinetuneConfig, report: Report, max_tokens: int) -> dict[str, Any]:
    """What "auto" becomes."""
    number = report.examples
    epochs = settings.epochs or auto_epochs(number)
    multiplier = settings.learning_rate_multiplier or 1.0
    return {
        "kind": report.kind,
        "examples": number,
        "epochs": epochs,
        "batch_size": min(settings.batch_size or auto_batch_size(number), number),
        "learning_rate_multiplier": multiplier,
        "learning_rate": LEARNING_RATES[settings.method] * multiplier,
        "rank": settings.rank if settings.method == "lora" else None,
        "alpha": 2 * settings.rank if settings.method == "lora" else None,
        "max_tokens": max_tokens,
        "format": settings.format or faster_dtype(),
        "trained_tokens": report.tokens * epochs,
    }


def faster_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 where this machine multiplies it at least half as fast again."""
    return (
        "bfloat16"
        if bench.peak_flops("bfloat16") > 1.5 * bench.peak_flops("float32")
        else "float32"
    )


def _remove_old_adapters(adapters: Path) -> None:
    steps = sorted(int(path.name[5:]) for path in adapters.glob("step-*"))
    for step in steps[:-MAX_EPOCH_ADAPTERS]:
        run_dir.remove_dir_atomic(adapters / f"step-{step}")


def _save_adapter(
    folder: Path, adapter: lora.Adapter, cfg: Model, settings: FinetuneConfig
) -> None:
    lora.save(folder, adapter, cfg, base_model=settings.model.stem)


def _save_model(folder: Path, params: Any, cfg: Model, tokenizer: Tokenizer, source: Path) -> None:
    """Write the weights, the tokenizer and the generation config, so that it can be served."""
    checkpoint.save(folder, params, cfg)
    if source.is_dir():
        names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        names += ["chat_template.jinja", "chat_template.json"]
        for name in names:
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
        if (templates := source / "additional_chat_templates").is_dir():
            shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
        settings = read_optional_json(source / "generation_config.json")
    else:
        run_dir.save_tokenizer(folder, tokenizer)
        metadata, _ = gguf.read(source)
        settings, _ = gguf.sampling_defaults(metadata)
    run_dir.save_generation_config(folder, tokenizer, settings)
