"""Decoders: choose a dtype, read weights and tokenizer, allocate the KV cache, start the engine."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

import bpe
from serve.models import benchmarks, dtypes, fingerprint, generation_config
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.grammar import GrammarCompiler, build_when_idle
from serve.models.spec import (
    Example,
    Kind,
    LoadOptions,
    ModelFiles,
    ModelSpec,
    ToolSupport,
    stamp_of,
)
from serve.models.tool_calls import HARMONY, Notation, detect_notation
from transformer import checkpoint, lora
from transformer.checkpoint import Dtype
from transformer.checkpoint.gguf import split_files
from transformer.decoder import Params
from transformer.engine.build import build_runner, start_engine
from transformer.engine.engine import Engine
from transformer.engine.runner import Runner

MAX_BATCH_SIZE = 16  # sequences in a decoding step, on a server
RECORD_SECONDS = 60.0  # minimum time between two records of a model's speed


@dataclass(frozen=True, kw_only=True)
class DecoderModel:
    """A loaded decoder.

    Attributes:
        id: the id it is served under.
        created: seconds since 1970.
        owned_by: the publisher.
        tokenizer: its tokenizer and chat template.
        context: the maximum tokens of prompt and completion together.
        engine: generates tokens for all requests (continuous batching).
        fingerprint: changes with weights, dtype and library versions.
        dtype: the dtype of its weights.
        memory: bytes of weights and KV cache. A model with an adapter does not count the weights
            that it shares with its base model.
        runner: runs the programs on the device; models with an adapter share its weights.
        default_sampling: default sampling parameters, see `generation_config.py`.
        decision_temperature: the temperature of labels, see `api/routes/decisions.py`.
        grammar_compiler: compiles grammars for the vocabulary.
        label_priors: by question, the log-probabilities of its labels without an input [M, N].
    """

    kind: ClassVar[str] = "decoder"

    id: str
    created: int
    owned_by: str
    tokenizer: bpe.Tokenizer
    context: int
    engine: Engine
    fingerprint: str
    dtype: Dtype = "float32"
    memory: int = 0
    runner: Runner | None = None
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    decision_temperature: float = 1.0
    grammar_compiler: GrammarCompiler = field(init=False, repr=False, compare=False)
    label_priors: dict[tuple[str, ...], np.ndarray] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "grammar_compiler", GrammarCompiler(self.tokenizer))

    @functools.cached_property
    def known_ids(self) -> frozenset[int]:
        """Return the ids of the vocabulary, which may have gaps."""
        return known_ids(self.tokenizer.encoding)

    @functools.cached_property
    def tool_notation(self) -> Notation | None:
        """Return the notation for tool calls that the chat template has; None for none of ours."""
        return detect_notation(self.tokenizer.chat_template)

    @property
    def has_channels(self) -> bool:
        """Whether answers are messages on channels; see `harmony.py`."""
        return self.tool_notation is HARMONY

    @functools.cached_property
    def tools(self) -> ToolSupport | None:
        """Return how the model calls tools; None if it does not chat."""
        return tool_support(self.tokenizer.chat_template)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return self.engine.is_idle

    def close(self, timeout: float) -> None:
        """Cancel all requests within `timeout` seconds and accept no more; see `Engine.close`."""
        self.engine.close(drain=False, timeout=timeout)


def load_decoder(
    id: str,
    path: Path,
    *,
    owned_by: str,
    cache_budget: int,
    dtype: str = "auto",
    max_batch_size: int = 2,
    sha256: str | None = None,
    accepted_dtypes: Sequence[Dtype] = (),
    memory_limit: int | None = None,
    default_sampling: Mapping[str, float] | None = None,
    decision_temperature: float = 1.0,
    notify: Callable[[str], None] = lambda line: None,
    on_speed: Callable[[int, float], None] = lambda tokens, seconds: None,
) -> DecoderModel:
    """Load a decoder and start its engine.

    Args:
        id: the id to serve it under.
        path: a GGUF file or a Hugging Face folder.
        owned_by: the publisher.
        cache_budget: bytes of the KV cache, for all sequences together.
        dtype: "float32", "bfloat16", "int8", "int4", or "auto" for the fastest accurate dtype on
            this machine.
        max_batch_size: the maximum batch size of a decoding step. Programs for larger batches are
            compiled while the first requests run.
        sha256: the SHA-256 of the file in hex; None to compute it.
        accepted_dtypes: the dtypes known to be accurate; empty to measure the accuracy.
        memory_limit: the maximum bytes of weights and KV cache; None for the available memory.
        default_sampling: the model's default sampling parameters; others have OpenAI's defaults.
        decision_temperature: as for `DecoderModel`.
        notify: called with a message for each slow operation.
        on_speed: called with (tokens, seconds) of each sequence that ran alone.

    Raises:
        OSError: the file cannot be read.
        MemoryError: the model does not fit into the available memory.
        ValueError: the file is damaged or of an unknown kind, or the cache budget is less than one
            block.
    """
    enable_compilation_cache()
    requested = dtypes.parse_dtype(dtype, dtypes.DTYPES)
    header = checkpoint.read_header(path)
    cfg = header.cfg
    tokenizer = read_tokenizer(path, header)
    weights = sha256 or fingerprint.hash_weights(path)
    if requested is None:
        key = fingerprint.machine_key(weights)
        chosen = dtypes.choose_dtype(
            id, path, cfg, key, cache_budget, notify, accepted_dtypes, memory_limit
        )
    else:
        (chosen,) = dtypes.fitting_dtypes(id, cfg, cache_budget, (requested,))
    params, cfg, _ = checkpoint.load(path, dtype=chosen, header=header)
    del header  # closes the files
    params = mask_unused_ids(params, tokenizer.encoding)
    cache_dtype = jnp.float32 if chosen == "float32" else jnp.bfloat16
    vocab_size = tokenizer.encoding.n_vocab
    runner = build_runner(params, cfg, vocab_size, cache_budget, cache_dtype, notify=notify)
    return DecoderModel(
        id=id,
        created=int(weights_file(path).stat().st_mtime),
        owned_by=owned_by,
        tokenizer=tokenizer,
        context=runner.context,
        engine=start_engine(runner, max_batch_size=max_batch_size, on_speed=on_speed),
        fingerprint=fingerprint.system_fingerprint(weights, chosen),
        dtype=chosen,
        memory=runner.num_bytes,
        runner=runner,
        default_sampling=default_sampling or {},
        decision_temperature=decision_temperature,
    )


def load_adapter(
    id: str,
    folder: Path,
    base: DecoderModel,
    *,
    created: int,
    owned_by: str,
    max_batch_size: int = 2,
) -> DecoderModel:
    """Return the base model with a LoRA adapter, with its own KV cache and engine.

    The weight arrays are shared with the base model, and stay in memory as long as either model.

    Args:
        id: the id to serve it under.
        folder: the adapter, in PEFT's layout; see `transformer/lora.py`.
        base: the model on which the adapter was trained.
        created: seconds since 1970.
        owned_by: the publisher.
        max_batch_size: as for `load_decoder`.

    Raises:
        OSError: a file cannot be read.
        ValueError: the adapter is damaged, or belongs to another model.
    """
    assert base.runner is not None
    adapter = lora.load(folder, base.runner.cfg)
    runner = base.runner.with_adapter(adapter)
    weights = f"{base.fingerprint} {fingerprint.hash_weights(folder / lora.WEIGHTS_FILE)}"
    return dataclasses.replace(
        base,
        id=id,
        created=created,
        owned_by=owned_by,
        engine=start_engine(runner, max_batch_size=max_batch_size),
        fingerprint=fingerprint.system_fingerprint(weights, base.dtype),
        memory=runner.num_bytes - base.runner.weight_bytes,
        runner=runner,
    )


def weights_file(path: Path) -> Path:
    """Return the file whose modification time is the model's creation time."""
    return path / "config.json" if path.is_dir() else path


def known_ids(encoding: bpe.Encoding) -> frozenset[int]:
    """Return all ids that stand for a token."""
    return frozenset(encoding.token_ids)


def read_tokenizer(path: Path, header: checkpoint.Header) -> bpe.Tokenizer:
    """Return the tokenizer of a model.

    Args:
        path: a GGUF file or a Hugging Face folder.
        header: the header of its weights.

    Raises:
        ValueError: the tokenizer cannot be read or appends EOS to each text, the chat template has
            an error, or the embedding table has no row for a token; see
            `bpe.Tokenizer.for_embedding_table`.
    """
    if path.is_dir():
        tokenizer = bpe.load(path)
    else:
        tokenizer = bpe.from_gguf(header.metadata, source=str(path))
    if tokenizer.chat_template is not None:
        tokenizer.chat_template.compile()
    if tokenizer.add_eos:
        raise ValueError(
            "the tokenizer appends EOS to every text, so the model cannot continue a text: use a "
            "decoder"
        )
    try:
        return tokenizer.for_embedding_table(header.cfg.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def mask_unused_ids(params: Params, encoding: bpe.Encoding) -> Params:
    """Return params with which ids that stand for no token are never sampled.

    A vocabulary can have gaps. The output projection gets a bias of minus infinity for the ids in
    a gap, which costs nothing per decoding step. Without gaps, `params` is returned unchanged. The
    sampler masks the rows of the embedding table after the last token.
    """
    table = params.embed if params.head is None else params.head
    known = known_ids(encoding)
    gaps = [id for id in range(encoding.n_vocab) if id not in known]
    if not gaps:
        return params
    bias = np.zeros(table.weight.shape[0], np.float32)
    bias[gaps] = -np.inf
    table = dataclasses.replace(table, bias=jnp.asarray(bias))
    return dataclasses.replace(params, **{"embed" if params.head is None else "head": table})


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """Return the spec of a decoder; see `Kind.describe`."""
    header = checkpoint.read_header(files.path)
    cfg = header.cfg
    is_verified = files.entry is not None and bool(files.entry.files)
    sha256 = files.entry.files[0].sha256 if files.entry and is_verified else None
    accepted_dtypes = files.entry.dtypes if files.entry else ()
    capabilities = files.entry.serves if files.entry else ()
    if is_verified and not files.path.is_dir():
        template = chat_template_of_gguf(header.metadata)  # without reading the vocabulary
    else:
        template = read_tokenizer(files.path, header).chat_template
    if not is_verified:  # an unchecked file: report damage before a server starts
        checkpoint.check_tensors(files.path, header)
        if template is None:
            capabilities = ("completions",)
    defaults = {}
    if options.sampling_defaults == "model":
        defaults = load_default_sampling(files, options.notify, header.metadata)

    def memory() -> int:
        dtype = dtypes.parse_dtype(options.dtype, dtypes.DTYPES)
        if dtype is None:
            key = fingerprint.machine_key(sha256 or fingerprint.hash_weights(files.path))
            dtype = dtypes.expected_dtype(
                cfg, key, options.cache_budget, accepted_dtypes, options.memory_limit
            )
        return dtypes.weight_bytes(cfg, dtype) + options.cache_budget

    def load() -> DecoderModel:
        last_record = 0.0

        def on_speed(tokens: int, seconds: float) -> None:
            nonlocal last_record
            if (now := time.monotonic()) - last_record > RECORD_SECONDS or not last_record:
                last_record = now
                benchmarks.record(
                    options.home,
                    files.id,
                    tokens=tokens,
                    seconds=seconds,
                    memory=model.memory,
                )

        model = load_decoder(
            files.id,
            files.path,
            owned_by=files.publisher,
            cache_budget=options.cache_budget,
            dtype=options.dtype,
            max_batch_size=MAX_BATCH_SIZE,
            sha256=sha256,
            accepted_dtypes=accepted_dtypes,
            memory_limit=options.memory_limit,
            default_sampling=defaults,
            decision_temperature=files.entry.decision_temperature if files.entry else 1.0,
            notify=options.notify,
            on_speed=on_speed,
        )
        build_when_idle(model)
        return model

    return ModelSpec(
        id=files.id,
        created=int(weights_file(files.path).stat().st_mtime),
        owned_by=files.publisher,
        memory=memory,
        load=load,
        stamp=functools.partial(stamp_of, *split_files(files.path)),
        path=files.path,
        default_sampling=defaults,
        context=cfg.max_seq_len,
        capabilities=capabilities,
        tools=tool_support(template),
    )


def chat_template_of_gguf(metadata: Mapping[str, Any]) -> bpe.ChatTemplate | None:
    """Return the chat template of a GGUF file, without special tokens."""
    source, tool_use = (
        metadata.get(key) for key in ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")
    )
    if source is None:
        return None
    return bpe.ChatTemplate(source, tool_use_template=tool_use and bpe.ChatTemplate(tool_use))


def tool_support(template: bpe.ChatTemplate | None) -> ToolSupport | None:
    """Return how a model with this chat template calls tools; None if it cannot call tools."""
    if template is None:
        return None
    return "prompted" if detect_notation(template) is None else "trained"


def load_default_sampling(
    files: ModelFiles, notify: Callable[[str], None], metadata: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Return the default sampling parameters of a decoder.

    Args:
        files: the files of the model.
        notify: called with a message for each value that cannot be used.
        metadata: the metadata of a GGUF file, if it was read already.
    """
    row = files.entry.sampling if files.entry else {}
    return generation_config.read_defaults(row, files.path, notify, metadata)


def _recognizes(path: Path) -> bool:
    if not path.is_dir():
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _example(model: DecoderModel) -> Example:
    if model.tokenizer.chat_template:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        return Example(
            route="chat/completions",
            call="chat.completions.create",
            result="choices[0].message.content",
            fields={"messages": question, "temperature": 0},
        )
    return Example(
        route="completions",
        call="completions.create",
        result="choices[0].text",
        fields={"prompt": "The capital of France is", "temperature": 0},
    )


KIND = Kind(
    name="decoder",
    task="generate text",
    recognizes=_recognizes,
    describe=describe,
    example=_example,
)
