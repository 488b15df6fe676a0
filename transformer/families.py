"""Conversion of the configs of published decoder families: `config.json` and GGUF metadata.

`FAMILIES` has one entry per family: the fields that define it, and the names of its keys. A key
that changes the forward pass in an unsupported way raises; other unknown keys are ignored and
logged (`config_keys.py` has the list). Follows the configuration classes of transformers 5, the
spellings of older files, and the key list of ggml's docs/gguf.md.

Leaves out: the vision encoders of larger Gemma 3 models, mixtures of experts, and RoPE scaling
other than linear, Llama 3's and YaRN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformer import config_keys
from transformer.config import MAX_LAYERS, ROPE_SCALING_FIELDS, Config, RopeScaling, check_size

_GPT2_FIELDS: dict[str, Any] = dict(
    norm="layer", position="learned", mlp="gelu", qkv_bias=True, linear_bias=True,
    qk_norm=False, post_norms=False, scale_embeddings=False,
)  # fmt: skip
_LLAMA_FIELDS: dict[str, Any] = dict(
    norm="rms", position="rope", mlp="swiglu", qkv_bias=False, linear_bias=False,
    qk_norm=False, post_norms=False, scale_embeddings=False,
)  # fmt: skip
_GPT2_KEYS = {
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "vocab_size": "vocab_size",
    "n_positions": "max_seq_len",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_LLAMA_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_LLAMA_DEFAULTS = dict(rope_theta=10_000.0, tie_word_embeddings=False, rms_norm_eps=1e-6)
_SILU = ("hidden_act", ("silu", "swish"))
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")  # synonyms
_QK_NORM: dict[str, tuple] = dict.fromkeys(("qk_norm", "use_qk_norm"), (True,))


@dataclass(frozen=True, kw_only=True)
class Family:
    """Properties of one `model_type`."""

    architecture: str  # class name in transformers
    gguf: str  # general.architecture of its GGUF files
    fixed_fields: Mapping[str, Any]  # fields that all its models share
    keys: Mapping[str, str]  # key of config.json -> field
    hf_defaults: Mapping[str, Any]  # defaults of transformers for keys that config.json lacks
    activation: tuple[str, tuple[str, ...]]  # key, and the synonyms of the activation function
    derived: frozenset[str] = frozenset({"head_dim"})  # fields with a default from other fields
    neutral: Mapping[str, tuple] = field(default_factory=dict)  # overrides `config_keys.CONFIG`


FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        gguf="gpt2",
        fixed_fields=_GPT2_FIELDS,
        keys=_GPT2_KEYS,
        hf_defaults=dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5),
        activation=("activation_function", _TANH_GELU),
        derived=frozenset({"head_dim", "num_kv_heads", "d_ff"}),
        neutral=config_keys.LAYER_NORM,
    ),
    "llama": Family(  # Llama 2 and 3, TinyLlama, SmolLM2
        architecture="LlamaForCausalLM",
        gguf="llama",
        fixed_fields=_LLAMA_FIELDS,
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS,
        activation=_SILU,
        derived=frozenset({"head_dim", "num_kv_heads"}),
    ),
    "mistral": Family(  # its GGUF files lack the window and have the architecture llama
        architecture="MistralForCausalLM",
        gguf="llama",
        fixed_fields=_LLAMA_FIELDS,
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS | dict(sliding_window=4096),
        activation=_SILU,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        gguf="qwen2",
        fixed_fields=_LLAMA_FIELDS | dict(qkv_bias=True),
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS
        | dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28),
        activation=_SILU,
        # Its queries, keys and values have biases, whatever the values of these keys.
        neutral=dict.fromkeys(("attention_bias", "qkv_bias", "use_qkv_bias"), (True, False)),
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        gguf="qwen3",
        fixed_fields=_LLAMA_FIELDS | dict(qk_norm=True),
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS
        | dict(head_dim=128, use_sliding_window=False, sliding_window=4096, max_window_layers=28),
        activation=_SILU,
        derived=frozenset(),
        neutral=_QK_NORM,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        gguf="gemma3",
        fixed_fields=_LLAMA_FIELDS
        | dict(norm="unit_rms", mlp="geglu", qk_norm=True, post_norms=True, scale_embeddings=True),
        keys=_LLAMA_KEYS
        | {"query_pre_attn_scalar": "query_scalar", "rope_local_base_freq": "local_rope_theta"},
        hf_defaults=dict(
            head_dim=256,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
            sliding_window=4096,
            sliding_window_pattern=6,
            tie_word_embeddings=True,
        ),
        activation=("hidden_activation", ("gelu_pytorch_tanh", *_TANH_GELU)),
        derived=frozenset(),
        neutral=_QK_NORM,
    ),
}

_SCALING_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_LAYER_TYPES = {_LOCAL, _GLOBAL}


def from_hf(config: Mapping[str, Any]) -> Config:
    """Convert the dictionary of a Hugging Face `config.json`.

    A key with the value null is treated as absent, with two exceptions: a `sliding_window` of null
    means no window, and a `num_key_value_heads` of null means the number of heads.

    Raises:
        ValueError: The model type is unknown, a key is missing or has an invalid value, or a key
            changes the forward pass in a way that this model type does not support.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    non_null = {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
    rest: dict[str, Any] = {**family.hf_defaults, **non_null}
    if config.get("num_key_value_heads", 0) is None:  # unlike absent, where the default may differ
        rest["num_key_value_heads"] = config.get("num_attention_heads")
    key, names = family.activation
    if rest.setdefault(key, names[0]) not in names:
        raise ValueError(f"{key} must be {' or '.join(map(repr, names))}, got {rest[key]!r}")

    fields: dict[str, Any] = dict(family.fixed_fields)
    if family.fixed_fields["position"] == "rope":
        _pop_rope(rest, fields)
        num_layers: Any = rest.get("num_hidden_layers")
        check_size("num_hidden_layers", num_layers, MAX_LAYERS)
        fields["windows"] = _pop_windows(rest, family, num_layers)
    for key, name in family.keys.items():
        if key in rest:
            fields[name] = rest.pop(key)

    unset = {name: key for key, name in family.keys.items() if fields.get(name) is None}
    if missing := [key for name, key in unset.items() if name not in family.derived]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for name in ("num_heads", "d_model"):
        check_size(name, fields[name])
    defaults = {
        "num_kv_heads": fields["num_heads"],
        "head_dim": fields["d_model"] // fields["num_heads"],
        "d_ff": 4 * fields["d_model"],
    }
    for name in family.derived:
        if fields.get(name) is None:
            fields[name] = defaults[name]
    if fields.get("query_scalar") == fields["head_dim"]:
        fields["query_scalar"] = None  # the default is head_dim
    cfg = Config(**fields)
    window = rest.get("sliding_window")
    if rest.get("use_sliding_window") is False or _covers(window, cfg):
        rest.pop("sliding_window", None)  # as in a Qwen2 that was converted to a Llama
    neutral_overrides = dict.fromkeys(config_keys.ACTIVATIONS, names) | dict(family.neutral)
    config_keys.check(rest, cfg, kind, neutral_overrides=neutral_overrides)
    return cfg


def to_hf(cfg: Config) -> dict[str, Any]:
    """Return the `config.json` dictionary that `from_hf` converts to an equal config.

    Raises:
        ValueError: No Hugging Face model type has this combination of fields.
    """
    kinds = [
        kind
        for kind, family in FAMILIES.items()
        if all(getattr(cfg, name) == value for name, value in family.fixed_fields.items())
    ]
    if not kinds:
        raise ValueError(f"no Hugging Face model type matches {cfg}")
    # Llama and Mistral differ only in the window.
    kind = kinds[0] if len(kinds) == 1 or cfg.windows == (None,) else "mistral"
    family = FAMILIES[kind]
    out = {"model_type": kind, "architectures": [family.architecture]}
    out |= {family.activation[0]: family.activation[1][0]}
    out |= {key: getattr(cfg, name) for key, name in family.keys.items()}
    if "query_pre_attn_scalar" in out and cfg.query_scalar is None:
        out["query_pre_attn_scalar"] = cfg.head_dim
    if cfg.position == "rope":
        out["rope_theta"] = cfg.rope_theta
        if cfg.rope_scaling is not None:
            scaling = dataclasses.asdict(cfg.rope_scaling)
            out["rope_scaling"] = {"rope_type": scaling.pop("rope_type")} | {
                key: scaling[name]
                for key, name in _SCALING_KEYS.items()
                if scaling[name] is not None
            }
            if not cfg.rope_scaling.truncate:
                out["rope_scaling"]["truncate"] = False
    window = next((window for window in cfg.windows if window is not None), None)
    if "sliding_window" in family.hf_defaults:
        out["sliding_window"] = window
    if "use_sliding_window" in family.hf_defaults:
        out["use_sliding_window"] = window is not None
    if "sliding_window" in family.hf_defaults and kind != "mistral":
        out["layer_types"] = [
            _GLOBAL if cfg.window(i) is None else _LOCAL for i in range(cfg.num_layers)
        ]
    if (restored := from_hf(out)) != cfg:
        lost = [
            f.name
            for f in dataclasses.fields(cfg)
            if getattr(restored, f.name) != getattr(cfg, f.name)
        ]
        raise ValueError(f"the config.json of {kind} cannot store {', '.join(lost)} of {cfg}")
    return out


def _pop_rope(rest: dict[str, Any], fields: dict[str, Any]) -> None:
    """Move the RoPE keys of `rest` to `fields`; keys that are not used stay in `rest`.

    transformers 4 wrote `rope_theta` and `rope_scaling`. transformers 5 writes both into
    `rope_parameters`, or into one such object per layer type if they differ. An older key takes
    precedence.
    """
    if rest.get("rope_scaling") is False:  # as null, like in transformers
        del rest["rope_scaling"]
    objects = {}
    for key in ("rope_scaling", "rope_parameters"):
        objects[key] = value = rest.pop(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be an object, got {value!r}")
    rope = objects["rope_scaling"] or objects["rope_parameters"]
    if rope and rope.keys() <= _LAYER_TYPES:
        if "rope_local_base_freq" not in rest:
            raise ValueError("rope_parameters per layer type are not supported by this model type")
        for key, value in rope.items():
            if not isinstance(value, Mapping):
                raise ValueError(f"rope_parameters of {key} must be an object, got {value!r}")
        local = dict(rope.get(_LOCAL, {}))
        if (kind := local.pop("rope_type", "default")) != "default":
            raise ValueError(f"rope_parameters of {_LOCAL} must be 'default', got {kind!r}")
        rest["rope_local_base_freq"] = local.pop("rope_theta", rest["rope_local_base_freq"])
        rest |= local
        rope = rope.get(_GLOBAL, {})
    rope = {"rope_theta": rest.pop("rope_theta")} | {
        key: value for key, value in rope.items() if value is not None or key == "factor"
    }
    fields["rope_theta"] = rope.pop("rope_theta")
    # Phi-3 has this key outside the object; it takes precedence.
    original = rest.pop("original_max_position_embeddings", None)
    if original is not None:
        rope["original_max_position_embeddings"] = original
    fields["rope_scaling"], unused = _parse_scaling(rope, rest.get("max_position_embeddings"))
    for key, value in unused.items():
        rest.setdefault(key if key in config_keys.CONFIG else f"rope_scaling.{key}", value)


def _parse_scaling(
    rope: dict[str, Any], max_seq_len: Any
) -> tuple[RopeScaling | None, Mapping[str, Any]]:
    """Convert a `rope_scaling` object; return the scaling and the unused keys.

    The optional keys of YaRN are handled as in transformers (`modeling_rope_utils.py`): the default
    of the original length is `max_seq_len`, a factor of null is the ratio of the two, and `mscale`
    and `mscale_all_dim` are used if both are present and `attention_factor` is not.
    """
    rest = dict(rope)
    old_name = rest.pop("type", None)
    kind: Any = rest.pop("rope_type", old_name)
    factor = rest.get("factor")
    if kind is None and factor in (None, 1):
        kind = "default"
    if kind == "dynamic" and factor == 1:  # it changes nothing up to the pretraining length
        kind = "default"
    if kind == "default":
        if factor not in (None, 1):
            raise ValueError(f"factor must be absent with rope_type 'default', got {factor!r}")
        return None, rest
    if not isinstance(kind, str) or kind not in ROPE_SCALING_FIELDS:
        known = ", ".join(["default", *ROPE_SCALING_FIELDS])
        raise ValueError(f"rope_type must be one of {known}, got {kind!r}")
    required = {key for key, name in _SCALING_KEYS.items() if name in ROPE_SCALING_FIELDS[kind]}
    fields: dict[str, Any] = {}
    if "original_max_position_embeddings" in required:
        rest.setdefault("original_max_position_embeddings", max_seq_len)
    if kind == "yarn" and "factor" in rest:
        if factor is None:
            original = rest["original_max_position_embeddings"]
            check_size("original_max_position_embeddings", original)
            check_size("max_position_embeddings", max_seq_len)
            rest["factor"] = factor = max_seq_len / original
        mscales = [rest.pop(key, None) for key in ("mscale", "mscale_all_dim")]
        if "attention_factor" not in rest and isinstance(factor, int | float):
            if not all(isinstance(m, int | float | None) for m in mscales):
                raise ValueError(f"mscale and mscale_all_dim must be numbers, got {mscales}")
            numerator, denominator = mscales if all(mscales) else (1.0, 0.0)
            rest["attention_factor"] = yarn_mscale(factor, numerator) / yarn_mscale(
                factor, denominator
            )
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            rest[key] = rest.get(key) or default
        fields["truncate"] = rest.pop("truncate", True)
    if missing := [key for key in _SCALING_KEYS if key in required - rest.keys()]:
        raise ValueError(f"rope_type {kind!r} lacks {', '.join(missing)}")
    fields |= {_SCALING_KEYS[key]: rest.pop(key) for key in required}
    fields["rope_type"] = kind
    return RopeScaling(**fields), rest


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's multiplier of cosines and sines (arXiv:2309.00071, section 3.4).

    Args:
        factor: Ratio of the extended context to the original one.
        mscale: Coefficient of some models (DeepSeek); 1 is the paper.

    Returns:
        0.1 * mscale * ln(factor) + 1, or 1 for a factor below 1.
    """
    return 0.1 * mscale * math.log(max(factor, 1)) + 1.0


def _pop_windows(rest: dict[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Remove the keys of sliding windows from `rest`; return the windows of the layers."""

    def pop(key: str, default: Any) -> Any:  # only keys of this family
        return rest.pop(key) if key in family.hf_defaults else default

    size, num_full = pop("sliding_window", None), pop("max_window_layers", 0)
    if not pop("use_sliding_window", True):
        size = None  # files of Qwen have a window that is disabled
    if size is not None:
        check_size("sliding_window", size)
    period = pop("sliding_window_pattern", None)
    if period is not None:
        period = rest.pop("_sliding_window_pattern", period)  # as transformers writes it
        check_size("sliding_window_pattern", period, MAX_LAYERS)
    if (types := rest.pop("layer_types", None)) is None:
        if size is None:
            return (None,)
        if period is not None:  # Gemma 3: every sixth layer has no window
            return (size,) * (period - 1) + (None,)
        return (None,) * min(num_full, num_layers) + (size,) * max(num_layers - num_full, 0)
    if not isinstance(types, list) or len(types) != num_layers or {*map(str, types)} - _LAYER_TYPES:
        raise ValueError(
            f"layer_types must be a list of {' or '.join(sorted(_LAYER_TYPES))} for each of "
            f"{num_layers} layers, got {types!r}"
        )
    if _LOCAL in types and size is None:
        raise ValueError(f"layer_types has {_LOCAL}, but sliding_window is absent or disabled")
    return tuple(size if kind == _LOCAL else None for kind in types)


def _covers(window: Any, cfg: Config) -> bool:
    """Whether a sliding window is at least as long as the context, so that it has no effect."""
    return isinstance(window, int) and window >= cfg.max_seq_len


def from_gguf(
    metadata: Mapping[str, Any], *, has_head: bool, rope_factors: Sequence[float] | None = None
) -> Config:
    """Convert the metadata of a GGUF file.

    Args:
        metadata: The key-value section of the file.
        has_head: Whether the file has `output.weight`; without it the embeddings are tied.
        rope_factors: Divisors of the rotary frequencies from `rope_freqs.weight`, if the file has
            it.

    Returns:
        The config.

    Raises:
        ValueError: The architecture is unknown, a key is missing or has an invalid value, or a key
            changes the forward pass in a way that this architecture does not support.
    """
    _check_single_model(metadata)
    kind = metadata.get("general.architecture")
    known = {family.gguf: family for family in reversed(FAMILIES.values())}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"general.architecture must be one of {sorted(known)}, got {kind!r}")
    family = known[kind]
    rest = {
        key.removeprefix(f"{kind}."): value
        for key, value in metadata.items()
        if key.startswith(f"{kind}.")
    }

    def pop(key: str, default: Any = None) -> Any:
        value = rest.pop(key, default)
        if value is None:
            raise ValueError(f"the GGUF metadata lacks {kind}.{key}")
        return value

    heads, d_model = pop("attention.head_count"), pop("embedding_length")
    check_size("attention.head_count", heads)
    check_size("embedding_length", d_model)
    tokens = metadata.get("tokenizer.ggml.tokens")
    is_layer_norm = family.fixed_fields["norm"] == "layer"
    fields = dict(
        family.fixed_fields,
        num_layers=pop("block_count"),
        num_heads=heads,
        num_kv_heads=pop("attention.head_count_kv", heads),
        head_dim=pop("attention.key_length", d_model // heads),
        d_model=d_model,
        d_ff=pop("feed_forward_length"),
        vocab_size=pop("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        max_seq_len=pop("context_length"),
        norm_eps=pop(f"attention.layer_norm_{'' if is_layer_norm else 'rms_'}epsilon"),
        tie_embeddings=not has_head,
    )
    if fields["position"] == "rope":
        fields["rope_theta"] = pop("rope.freq_base", 10_000.0)
        if (rotated := pop("rope.dimension_count", fields["head_dim"])) != fields["head_dim"]:
            raise ValueError(f"{kind}.rope.dimension_count must be head_dim, got {rotated}")
        fields["rope_scaling"] = _gguf_scaling(rest, fields, rope_factors)
    if kind == "gemma3":
        fields["local_rope_theta"] = pop("rope.freq_base_swa", 10_000.0)
        fields["windows"] = _gguf_windows(rest, pop("attention.sliding_window"))
        if fields["num_layers"] == 62:  # the 27B model has no key for it; llama.cpp does the same
            fields["query_scalar"] = d_model // heads
    if (width := pop("attention.value_length", fields["head_dim"])) != fields["head_dim"]:
        raise ValueError(f"{kind}.attention.value_length must be head_dim, got {width}")
    cfg = Config(**fields)
    if _covers(rest.get("attention.sliding_window"), cfg):
        del rest["attention.sliding_window"]
    config_keys.check_gguf(rest, cfg, kind)
    return cfg


def _check_single_model(metadata: Mapping[str, Any]) -> None:
    """Reject an adapter, a projector or a part of a split model; log keys of unknown sections."""
    if (content := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"general.type must be 'model', got {content!r}")
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count > 1:
        raise ValueError(
            f"split.count must be 1, got {count!r}: this file is a part of a model; join the parts "
            "with llama-gguf-split --merge"
        )
    sections = {"general", "tokenizer", "split", "quantize", "imatrix", "GGUF"}
    sections.add(str(metadata.get("general.architecture")))
    others = sorted(key for key in metadata if key.partition(".")[0] not in sections)
    config_keys.log_ignored_keys("GGUF metadata", tuple(others))


def _gguf_windows(rest: dict[str, Any], size: int) -> tuple[int | None, ...]:
    """Return the windows of Gemma 3, from one flag per layer or the period of full layers."""
    pattern = rest.pop("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        return tuple(size if is_local else None for is_local in pattern)
    check_size("attention.sliding_window_pattern", pattern, MAX_LAYERS)
    return (size,) * (pattern - 1) + (None,)


def _gguf_scaling(
    rest: dict[str, Any], fields: dict[str, Any], factors: Sequence[float] | None
) -> RopeScaling | None:
    """Convert the keys `rope.scaling.*`, or Llama 3's table of factors.

    As in llama.cpp, the default type is linear, and a factor of 0 means 1.
    """
    kind = rest.pop("rope.scaling.type", "linear")
    factor = rest.pop("rope.scaling.factor", 0) or 1
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    for key, name in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if value := rest.pop(f"rope.scaling.{key}", None):
            rope[name] = value
    if kind == "none" or (kind == "linear" and factor == 1):
        return None if factors is None else _llama3_scaling(factors, fields)
    if factors is not None:
        raise ValueError(f"rope.scaling.type must be none with rope_freqs.weight, got {kind!r}")
    if kind == "yarn" and isinstance(factor, int | float):
        attn_factor = rest.pop("rope.scaling.attn_factor", 1)
        if not isinstance(attn_factor, int | float):
            raise ValueError(f"rope.scaling.attn_factor must be a number, got {attn_factor!r}")
        rope["attention_factor"] = yarn_mscale(factor) * attn_factor
        # llama.cpp ignores this key if it is 1 or equal to YaRN's own value.
        yarn_attn_factor = rest.get("rope.scaling.yarn_attn_factor")
        if isinstance(yarn_attn_factor, float) and math.isclose(
            yarn_attn_factor, yarn_mscale(factor), rel_tol=1e-6
        ):
            del rest["rope.scaling.yarn_attn_factor"]
    return _parse_scaling(rope, fields["max_seq_len"])[0]


def _llama3_scaling(factors: Sequence[float], fields: Mapping[str, Any]) -> RopeScaling:
    """Return the Llama 3 scaling that produces a table of factors.

    GGUF files store the table but not its parameters. All published models have the same three
    parameters and a factor equal to the largest entry of the table.
    """
    head_dim, theta = fields["head_dim"], fields["rope_theta"]
    scaling = RopeScaling(
        rope_type="llama3",
        factor=round(max(factors), 3),  # the file holds a rounded float32
        original_max_seq_len=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    expected = []
    for i in range(head_dim // 2):
        # Rotations of the pair within the original context.
        num_rotations = 8192 / (2 * math.pi * theta ** (2 * i / head_dim))
        unscaled = min(max((num_rotations - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / (unscaled + (1 - unscaled) / scaling.factor))
    is_match = len(expected) == len(factors) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, factors, strict=True)
    )
    if not is_match:
        raise ValueError(
            "rope_freqs.weight is not the table of Llama 3's RoPE scaling; other tables are not "
            "supported"
        )
    return scaling
