"""From a file to a model that answers: format, weights, tokenizer, cache, programs, engine."""

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
from serve.models import benchmarks, dtypes, fingerprint
from serve.models import generation_config as sampling_defaults
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.spec import Example, Kind, LoadOptions, ModelFiles, ModelSpec, stamp_of
from transformer import checkpoint, lora
from transformer.checkpoint import Dtype
from transformer.decoder import Params
from transformer.engine.build import build_runner, start_engine
from transformer.engine.engine import Engine
from transformer.engine.runner import Runner

MAX_BATCH_SIZE = 16  # of a decoding step, on a server
RECORD_SECONDS = 60.0  # between two notes of a model's speed


@dataclass(frozen=True, kw_only=True)
class DecoderModel:
    """A model that answers requests."""

    kind: ClassVar[str] = "decoder"

    id: str
    created: int  # seconds since 1970
    owned_by: str
    tokenizer: bpe.Tokenizer
    context: int  # tokens of prompt and answer together
    engine: Engine
    fingerprint: str  # changes with weights, format and library versions
    dtype: Dtype = "float32"
    memory: int = 0  # bytes of weights and cache; of an adapted model, of what is its own
    runner: Runner | None = None  # what computes; adapters share its weights
    default_sampling: Mapping[str, float] = field(
        default_factory=dict
    )  # defaults, see `sampling.py`

    @functools.cached_property
    def known_ids(self) -> frozenset[int]:
        """The ids of the vocabulary. There may be gaps among them, which mean nothing."""
        return known_ids(self.tokenizer.encoding)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is being answered."""
        return self.engine.is_idle

    def close(self, timeout: float) -> None:
        """Cancel what is being answered, and answer nobody any more; see `Engine.close`."""
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
    notify: Callable[[str], None] = lambda line: None,
    on_speed: Callable[[int, float], None] = lambda tokens, seconds: None,
) -> DecoderModel:
    """Loads a model and makes its engine.

    Args:
        path: a GGUF file or a Hugging Face folder.
        cache_budget: bytes for the keys and values of all its conversations.
        dtype: "float32", "bfloat16", "int8", or "auto" for the fastest that is good enough here.
        max_rows: steps of more rows than this are taken in parts; those up to it are compiled while
            the first requests are answered.
        sha256: of the file, if somebody has checked it already.
        good: the formats that are known to be good enough, if that is known.
        memory_limit: bytes that weights and cache may take at most; None for what is free.
        sampling: defaults of requests, beside OpenAI's.
        notify: told one line for each thing that takes long.
        on_speed: told (tokens, seconds) of requests that had the model for themselves.

    Raises:
        OSError: the file cannot be read.
        MemoryError: the model does not fit into the memory that is free.
        ValueError: the file is damaged, of an unknown kind, or the cache budget holds no block.
    """
    enable_compilation_cache()
    given = dtypes.parse_dtype(dtype, dtypes.DTYPES)
    header = checkpoint.read_header(path)
    cfg = header.cfg
    tokenizer = read_tokenizer(path, header)
    weights = sha256 or fingerprint.hash_weights(path)
    if given is None:
        name = fingerprint.machine_key(weights)
        chosen = dtypes.choose_dtype(
            id, path, cfg, name, cache_budget, notify, accepted_dtypes, memory_limit
        )
    else:
        (chosen,) = dtypes.fitting_dtypes(id, cfg, cache_budget, (given,))
    params, cfg, _ = checkpoint.load(path, dtype=chosen, header=header)
    del header  # it keeps the files open
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
    """A loaded model with an adapter beside its weights, and a cache and an engine of its own.

    The arrays of the weights are the base's, not copies; they stay as long as either model does.

    Args:
        folder: the adapter, in PEFT's layout; see `transformer/lora.py`.
        base: the model that it was trained on.
        max_rows: as of `load_model`.

    Raises:
        OSError: a file cannot be read.
        ValueError: the adapter is damaged, or of another model.
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
    """The file whose time is the model's."""
    return path / "config.json" if path.is_dir() else path


def known_ids(encoding: bpe.Encoding) -> frozenset[int]:
    """Every id that stands for a token."""
    return frozenset(encoding.ranks.values()) | frozenset(encoding.special_tokens.values())


def read_tokenizer(path: Path, header: checkpoint.Header) -> bpe.Tokenizer:
    """The tokenizer of a model.

    Raises:
        ValueError: it cannot be read, the chat template has a mistake, or there are more tokens
            than rows in the table.
    """
    folder = path.is_dir()
    tokenizer = bpe.load(path) if folder else bpe.from_gguf(header.metadata, source=str(path))
    if tokenizer.chat_template is not None:
        tokenizer.chat_template.compile()
    if tokenizer.encoding.n_vocab > header.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.encoding.max_token_value}, the model's table "
            f"of tokens only {header.cfg.vocab_size} rows: they do not belong together"
        )
    return tokenizer


def mask_unused_ids(params: Params, encoding: bpe.Encoding) -> Params:
    """Sees to it that ids which the vocabulary leaves out are never drawn.

    They get a bias of minus infinity in the head, which costs a step nothing, and is not there at
    all where there are no gaps. (Ids behind the last one are the sampler's business.)
    """
    table = params.embed if params.head is None else params.head
    known = known_ids(encoding)
    gaps = [id for id in range(encoding.n_vocab) if id not in known]
    if not gaps:
        return params
    bias = np.zeros(len(table.weight), np.float32)
    bias[gaps] = -np.inf
    table = dataclasses.replace(table, bias=jnp.asarray(bias))
    return dataclasses.replace(params, **{"embed" if params.head is None else "head": table})


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """See `Kind.describe`."""
    header = checkpoint.read_header(files.path)
    cfg = header.cfg
    sha256 = files.entry.files[0].sha256 if files.entry else None
    good = files.entry.dtypes if files.entry else ()
    if files.entry is None:  # a stranger: whatever is wrong with it is said before a server listens
        checkpoint.check_tensors(files.path, header)
        read_tokenizer(files.path, header)
    defaults = {}
    if options.sampling_defaults == "model":
        defaults = load_default_sampling(files, options.notify, header.metadata)

    def memory() -> int:
        format = dtypes.parse_dtype(options.dtype, dtypes.DTYPES)
        if format is None:
            name = fingerprint.machine_key(sha256 or fingerprint.hash_weights(files.path))
            format = dtypes.expected_dtype(
                cfg, name, options.cache_budget, good, options.memory_limit
            )
        return dtypes.weight_bytes(cfg, format) + options.cache_budget

    def load() -> DecoderModel:
        noted = 0.0

        def on_speed(tokens: int, seconds: float) -> None:
            nonlocal noted
            if (now := time.monotonic()) - noted > RECORD_SECONDS or not noted:
                noted = now
                benchmarks.record(
                    options.home,
                    files.id,
                    tokens=tokens,
                    seconds=seconds,
                    memory=served.memory,
                )

        served = load_decoder(
            files.id,
            files.path,
            owned_by=files.publisher,
            cache_budget=options.cache_budget,
            dtype=options.dtype,
            max_batch_size=MAX_BATCH_SIZE,
            sha256=sha256,
            accepted_dtypes=good,
            memory_limit=options.memory_limit,
            default_sampling=defaults,
            notify=options.notify,
            on_speed=on_speed,
        )
        return served

    return ModelSpec(
        id=files.id,
        created=int(weights_file(files.path).stat().st_mtime),
        owned_by=files.publisher,
        memory=memory,
        load=load,
        stamp=functools.partial(stamp_of, files.path),
        path=files.path,
        default_sampling=defaults,
    )


def load_default_sampling(
    files: ModelFiles, notify: Callable[[str], None], metadata: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """The sampling defaults of a decoder; see `sampling.of_model`."""
    own = files.entry.sampling if files.entry else {}
    return sampling_defaults.read_defaults(own, files.path, notify, metadata)


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
