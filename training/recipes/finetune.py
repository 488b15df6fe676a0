"""Fine-tuning of a decoder on a file of examples: a LoRA adapter, or all weights.

    from training.recipes import finetune

    finetune.run(finetune.FinetuneConfig(model="smollm2.gguf", data="examples.jsonl", out="mine"))

`run` is the recipe: it checks the file, resolves the "auto" settings and trains. It writes these
files to `out`:

    job.json        the resolved settings and the hashes of the data
    metrics.jsonl   the metrics of each step; loss.png plots the loss
    checkpoints/    the state to resume from
    adapters/       step-N, the adapters after each of the last epochs
    adapter/        the final LoRA adapter in the layout of PEFT
    model/          with method "full", instead of an adapter: the model as a Hugging Face folder

If `run` is called again with the same `out`, it resumes; if the run is complete, it does nothing.
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
from transformer import checkpoint, hf_config, lora
from transformer.checkpoint import gguf
from transformer.config import Config as Model

# Peak learning rates by method, for `learning_rate_multiplier` 1. An adapter starts at zero and
# needs larger updates.
LEARNING_RATES = {"lora": 1e-3, "full": 5e-5}
MAX_EPOCH_ADAPTERS = 3  # number of latest epochs whose adapters are kept


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The settings of a fine-tuning run. None means "auto".

    `run_dir.config_record` writes them to job.json, `dtype` under its earlier name "format".

    Attributes:
        model: the base model, a GGUF file or a Hugging Face folder.
        data: the training file, JSON lines; see training/examples.py.
        out: the folder of the run.
        valid: the validation file, if any.
        method: "lora" or "full".
        epochs: the number of epochs.
        batch_size: examples per step.
        learning_rate_multiplier: the factor that `LEARNING_RATES` is multiplied by; auto: 1.
        rank: the rank of the adapter.
        seed: the seed of the adapter and of the order of the examples.
        max_tokens: the maximum length of an example in tokens; auto: 2048, or the context length of
            the model if that is shorter.
        dtype: the dtype of the matrix products; auto: the faster one on this machine.

    Raises:
        ValueError: a field is out of range.
    """

    model: Path
    data: Path
    out: Path
    valid: Path | None = None
    method: Literal["lora", "full"] = "lora"
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    rank: int = 16
    seed: int = 0
    max_tokens: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        for name in ("model", "data", "out", "valid"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(value))
        if self.method not in LEARNING_RATES:
            raise ValueError(f"method must be 'lora' or 'full', got {self.method!r}")
        if self.dtype not in ("float32", "bfloat16", None):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        for name in ("epochs", "batch_size", "rank", "max_tokens", "learning_rate_multiplier"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")


@dataclass(frozen=True)
class Result:
    """The result of a fine-tuning run.

    Attributes:
        reason: "finished"; "signal" if a signal stopped the run after it saved its state; "refused"
            if a data file cannot be used for training (see `reports`).
        job: the contents of job.json; empty if a data file was refused.
        reports: the reports of the training file and of the validation file, if there is one.
        signal: the number of the signal that stopped the run; None if none did.
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
    """Fine-tune a model, or resume its fine-tuning.

    Args:
        settings: the settings of the run.
        notify: called with each progress message, a line of text.
        progress: whether to show a progress bar if standard error is a terminal.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the model is not supported, or `out` contains a run with other settings.
        FloatingPointError: the loss or the gradient is NaN or infinite.
    """
    out, record = settings.out, run_dir.config_record(settings)
    job = run_dir.read_job(out / "job.json", record)
    final = out / ("adapter" if settings.method == "lora" else "model")
    if job is not None and final.exists():
        return Result("finished", job)
    cfg = checkpoint.read_config(settings.model)
    check_trainable(cfg)
    tokenizer, max_tokens = read_tokenizer(settings.model, settings.max_tokens)
    report, examples = check.read_examples(settings.data, tokenizer, max_tokens=max_tokens)
    reports, held_out = [report], []
    if settings.valid is not None:
        valid_report, held_out = check.read_examples(
            settings.valid, tokenizer, max_tokens=max_tokens, kind=report.kind, minimum=1
        )
        reports.append(valid_report)
    if not all(report.ok for report in reports):
        return Result("refused", {}, tuple(reports))
    for file_report in reports:
        for warning in file_report.warnings:
            notify(f"{file_report.path}: {warning.message}")

    if job is None:
        job = {"given": record, **_resolve(settings, report, max_tokens)}
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

    # A micro-batch exceeds the limit only if it is one row with a very long example.
    remat = rows // batches.micro_batches * width > packing.MICRO_BATCH_TOKENS
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

    def on_step(state: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] % batches.steps_per_epoch:
            return
        speed = f"{metrics['tokens_per_second']:.0f} tok/s"
        notify(f"epoch {metrics['epoch']:.0f}: loss {metrics['loss']:.4f}, {speed}")
        if settings.method == "lora":
            name = f"step-{metrics['step']}"
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


def _task(
    settings: FinetuneConfig, job: dict[str, Any], cfg: Model, remat: bool
) -> tuple[DecoderTask | LoraTask, Any]:
    """Return the task, and the frozen weights that its loss takes."""
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


def check_trainable(cfg: Model) -> None:
    """Check that the result of fine-tuning can be saved; call it before training.

    Raises:
        ValueError: no format can store the model; some GGUF files have such combinations.
    """
    try:
        hf_config.to_hf(cfg)
    except ValueError as error:
        raise ValueError(f"the model cannot be fine-tuned, only used: {error}") from None


def lora_target_modules(cfg: Model) -> tuple[str, ...]:
    """Return the linear layers that get an adapter: all that PEFT's format can represent.

    Files of GPT-2, GPT-NeoX and Phi-3 store queries, keys and values as one matrix, whose adapter
    would have one matrix A for all three. The experts of a mixture have no adapters.
    """
    shared = lora.shared_modules(cfg)
    return tuple(module for module in lora.adaptable_modules(cfg) if module not in shared)


def read_tokenizer(model: Path, max_tokens: int | None = None) -> tuple[Tokenizer, int]:
    """Return the tokenizer of a model and the maximum length of an example.

    Args:
        model: a GGUF file or a Hugging Face folder.
        max_tokens: the requested maximum; None for 2048. The context length of the model limits
            the result.
    """
    cfg = checkpoint.read_config(model)
    tokenizer = formats.load(model).for_embedding_table(cfg.vocab_size)
    return tokenizer, min(max_tokens or 2048, cfg.max_seq_len)


def auto_epochs(examples: int) -> int:
    """Return the number of epochs for "auto": fewer for more examples, from 25 to 1."""
    return max(1, min(25, max(3, round(800 / examples)), 25_000 // examples))


def auto_batch_size(examples: int) -> int:
    """Return the batch size for "auto", from 1 to 16: smaller for fewer examples.

    So an epoch of few examples has enough steps.
    """
    return max(1, min(16, examples // 25))


def _resolve(settings: FinetuneConfig, report: Report, max_tokens: int) -> dict[str, Any]:
    """Return the values of job.json with all "auto" settings resolved."""
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
        "format": settings.dtype or faster_dtype(),
        "trained_tokens": report.tokens * epochs,
    }


def faster_dtype() -> Literal["float32", "bfloat16"]:
    """Return "bfloat16" if this machine multiplies it over 1.5 times as fast, else "float32"."""
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
    """Write a model folder that can be served: weights, tokenizer and generation config."""
    checkpoint.save(folder, params, cfg)
    if source.is_dir():
        names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
        names += ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"]
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
