"""Convert the configs of published decoder families: `config.json` and GGUF metadata.

`FAMILIES` has one entry per `model_type`: the fields of `Config` that define the family, and the
names of its keys. A key that changes the forward pass in an unsupported way raises ValueError;
other unknown keys are ignored and logged (`config_keys.py` has the list). Follows the configuration
classes of transformers 5, the spellings of older files, and the key list of ggml's docs/gguf.md.

Not supported: the vision encoders of larger Gemma 3 models, shared experts (Qwen2-MoE, DeepSeek),
and RoPE scaling other than linear, Llama 3's, YaRN and LongRoPE.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformer import config_keys
from transformer.config import (
    MAX_LAYERS,
    ROPE_SCALING_FIELDS,
    Config,
    RopeScaling,
    check_positive,
    check_size,
)

_GPT2_FIELDS: dict[str, Any] = dict(
    norm="layer", position="learned", qkv_bias=True, linear_bias=True,
    qk_norm=False, post_norms=False, scale_embeddings=False,
)  # fmt: skip
_LLAMA_FIELDS: dict[str, Any] = dict(
    norm="rms", position="rope", qkv_bias=False, linear_bias=False,
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
_GPT_NEOX_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "layer_norm_eps": "norm_eps",
    "use_parallel_residual": "parallel_residual",
    "tie_word_embeddings": "tie_embeddings",
}
_GEMMA_KEYS = _LLAMA_KEYS | {
    "query_pre_attn_scalar": "query_scalar",
    "attn_logit_softcapping": "attn_logit_softcap",
    "final_logit_softcapping": "final_logit_softcap",
}
_GRANITE_KEYS = _LLAMA_KEYS | {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_multiplier",
    "logits_scaling": "logits_scaling",
}
_EXPERT_COUNT = ("num_experts", "num_local_experts")  # synonyms in families with experts
_EXPERT_KEYS = {"num_experts_per_tok": "num_experts_per_tok"}
# Keys whose null means that the model has no window or cap; a missing key has a default instead.
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
# Names of activation functions -> `Config.mlp`.
_SILU: tuple[str, Mapping[str, str]] = ("hidden_act", dict.fromkeys(("silu", "swish"), "swiglu"))
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")  # synonyms
_GELU: dict[str, str] = dict.fromkeys(_TANH_GELU, "gelu")
_GEGLU: tuple[str, dict[str, str]] = (
    "hidden_activation",
    dict.fromkeys(("gelu_pytorch_tanh", *_TANH_GELU), "geglu"),
)
_QK_NORM: dict[str, tuple] = dict.fromkeys(("qk_norm", "use_qk_norm"), (True,))


@dataclass(frozen=True, kw_only=True)
class Family:
    """The description of one `model_type`: fixed fields, and keys of config.json and GGUF files."""

    architecture: str  # class name in transformers
    gguf: str  # general.architecture of the family's GGUF files
    fixed_fields: Mapping[str, Any]  # fields of `Config` with the same value in all models
    keys: Mapping[str, str]  # key of config.json -> field of `Config`
    hf_defaults: Mapping[str, Any]  # defaults of transformers for keys that config.json lacks
    # The key of the activation function, and a mapping of its valid values to `Config.mlp`.
    activation: tuple[str, Mapping[str, str]]
    # Fields that are computed from other fields if config.json does not have their keys.
    derived: frozenset[str] = frozenset({"head_dim"})
    # Values of keys that do not change the forward pass; overrides `config_keys.CONFIG`.
    neutral: Mapping[str, tuple] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()  # keys that the forward pass of the family ignores
    theta_key: str = "rope_theta"  # key of `Config.rope_theta`
    # Key of the fraction of each head's channels that is rotated; None: all are.
    rotary_key: str | None = None
    has_rope_layers: bool = False  # whether `no_rope_layers` lists the layers without rotation
    has_layer_types: bool = False  # whether `layer_types` lists the layers with a window
    # GGUF key -> (field, default); if the default is None, the value 0 means None.
    gguf_keys: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    # In GGUF files, every n-th layer has no window; 1: all layers have one; None: no windows.
    gguf_window_period: int | None = None
    gguf_window: int | None = None  # size of the window without its key; 0: no window
    gguf_rope_layers: tuple[bool, ...] = (True,)  # `Config.rope_layers` of GGUF files
    gguf_yarn_truncate: bool = True  # `RopeScaling.truncate` of GGUF files
    gguf_local_rope_theta: float | None = None  # default of rope.freq_base_swa
    # GGUF metadata have no key for query_scalar. It is d_model / num_heads in one model of the
    # family (27B), which is recognized by this number of layers.
    gguf_layers_of_27b: int | None = None


FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        gguf="gpt2",
        fixed_fields=_GPT2_FIELDS,
        keys=_GPT2_KEYS,
        hf_defaults=dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5),
        activation=("activation_function", _GELU),
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
        has_layer_types=True,
        # Queries, keys and values have biases, regardless of the values of these keys.
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
        has_layer_types=True,
        derived=frozenset(),
        neutral=_QK_NORM,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        gguf="gemma3",
        fixed_fields=_LLAMA_FIELDS
        | dict(norm="unit_rms", qk_norm=True, post_norms=True, scale_embeddings=True),
        keys=_GEMMA_KEYS | {"rope_local_base_freq": "local_rope_theta"},
        hf_defaults=dict(
            head_dim=256,
            query_pre_attn_scalar=256,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            rms_norm_eps=1e-6,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
            sliding_window=4096,
            sliding_window_pattern=6,
            tie_word_embeddings=True,
        ),
        activation=_GEGLU,
        derived=frozenset(),
        neutral=_QK_NORM,
        has_layer_types=True,
        gguf_keys={"final_logit_softcapping": ("final_logit_softcap", None)},
        gguf_window_period=6,
        gguf_window=0,
        gguf_local_rope_theta=10_000.0,
        gguf_layers_of_27b=62,
    ),
    "gemma": Family(  # Gemma, CodeGemma
        architecture="GemmaForCausalLM",
        gguf="gemma",
        fixed_fields=_LLAMA_FIELDS | dict(norm="unit_rms", scale_embeddings=True),
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS | dict(head_dim=256, tie_word_embeddings=True),
        # "gelu" in the first published files means the approximation, as in transformers.
        activation=("hidden_act", _GEGLU[1] | {"gelu": "geglu"}),
        derived=frozenset(),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        gguf="gemma2",
        fixed_fields=_LLAMA_FIELDS | dict(norm="unit_rms", post_norms=True, scale_embeddings=True),
        keys=_GEMMA_KEYS,
        hf_defaults=dict(
            head_dim=256,
            query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            rms_norm_eps=1e-6,
            rope_theta=10_000.0,
            sliding_window=4096,
            sliding_window_pattern=2,
            tie_word_embeddings=True,
        ),
        activation=_GEGLU,
        derived=frozenset(),
        has_layer_types=True,
        gguf_keys={
            "attn_logit_softcapping": ("attn_logit_softcap", 50.0),
            "final_logit_softcapping": ("final_logit_softcap", 30.0),
        },
        gguf_window_period=2,
        gguf_window=4096,
        gguf_layers_of_27b=46,
    ),
    "phi3": Family(  # Phi-3, Phi-3.5 and Phi-4
        architecture="Phi3ForCausalLM",
        gguf="phi3",
        fixed_fields=_LLAMA_FIELDS | dict(fused_projections=True),
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS
        | dict(
            rms_norm_eps=1e-5,
            sliding_window=None,
            original_max_position_embeddings=4096,
            partial_rotary_factor=1.0,
        ),
        activation=_SILU,
        derived=frozenset({"head_dim", "num_kv_heads"}),
        rotary_key="partial_rotary_factor",
        gguf_window_period=1,
        gguf_window=0,
    ),
    "gpt_neox": Family(  # Pythia
        architecture="GPTNeoXForCausalLM",
        gguf="gptneox",
        fixed_fields=_GPT2_FIELDS | dict(position="rope"),
        keys=_GPT_NEOX_KEYS,
        hf_defaults=dict(
            layer_norm_eps=1e-5,
            rotary_pct=0.25,
            rotary_emb_base=10_000.0,
            tie_word_embeddings=False,
            use_parallel_residual=True,
        ),
        activation=("hidden_act", {"gelu": "gelu_erf"} | _GELU),
        derived=frozenset({"head_dim", "num_kv_heads"}),
        neutral=config_keys.LAYER_NORM | {"position_embedding_type": ("rope", "rotary")},
        theta_key="rotary_emb_base",
        rotary_key="rotary_pct",
        gguf_keys={"use_parallel_residual": ("parallel_residual", True)},
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        gguf="olmo2",
        fixed_fields=_LLAMA_FIELDS
        | dict(qk_norm=True, qk_norm_over="projection", pre_norms=False, post_norms=True),
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS | dict(rms_norm_eps=1e-5),
        activation=_SILU,
        derived=frozenset({"head_dim", "num_kv_heads"}),
        neutral=_QK_NORM,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        gguf="granite",
        fixed_fields=_LLAMA_FIELDS,
        keys=_GRANITE_KEYS,
        hf_defaults=_LLAMA_DEFAULTS
        | dict(
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            attention_multiplier=1.0,
            logits_scaling=1.0,
        ),
        activation=_SILU,
        derived=frozenset({"head_dim", "num_kv_heads"}),
        gguf_keys={
            "embedding_scale": ("embedding_multiplier", 1.0),
            "residual_scale": ("residual_multiplier", 1.0),
            "attention.scale": ("attention_multiplier", None),
            "logit_scale": ("logits_scaling", 1.0),
        },
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        gguf="smollm3",
        fixed_fields=_LLAMA_FIELDS,
        keys=_LLAMA_KEYS,
        hf_defaults=_LLAMA_DEFAULTS
        | dict(
            rope_theta=2_000_000.0,
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=None,
        ),
        activation=_SILU,
        derived=frozenset({"head_dim", "num_kv_heads"}),
        has_rope_layers=True,
        has_layer_types=True,
        gguf_rope_layers=(True, True, True, False),
    ),
    "mixtral": Family(  # its GGUF files have the architecture llama
        architecture="MixtralForCausalLM",
        gguf="llama",
        fixed_fields=_LLAMA_FIELDS | dict(norm_topk_prob=True),
        keys=_LLAMA_KEYS | _EXPERT_KEYS | {"num_local_experts": "num_experts"},
        hf_defaults=_LLAMA_DEFAULTS
        | dict(
            rms_norm_eps=1e-5,
            rope_theta=1_000_000.0,
            sliding_window=None,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        activation=_SILU,
        derived=frozenset({"head_dim", "num_kv_heads"}),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        gguf="qwen3moe",
        fixed_fields=_LLAMA_FIELDS | dict(qk_norm=True),
        keys={key: name for key, name in _LLAMA_KEYS.items() if name != "d_ff"}
        | _EXPERT_KEYS
        | {
            "moe_intermediate_size": "d_ff",
            "num_experts": "num_experts",
            "norm_topk_prob": "norm_topk_prob",
        },
        hf_defaults=_LLAMA_DEFAULTS
        | dict(
            use_sliding_window=False,
            sliding_window=4096,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        activation=_SILU,
        neutral=_QK_NORM,
        unused=frozenset({"intermediate_size"}),  # the width of layers without experts
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        gguf="gpt-oss",
        fixed_fields=_LLAMA_FIELDS
        | dict(qkv_bias=True, linear_bias=True, attention_sinks=True, norm_topk_prob=True),
        keys=_LLAMA_KEYS
        | _EXPERT_KEYS
        | {"num_local_experts": "num_experts", "swiglu_limit": "swiglu_limit"},
        hf_defaults=dict(
            head_dim=64,
            rope_theta=150_000.0,
            rope_parameters=dict(
                rope_type="yarn",
                factor=32.0,
                original_max_position_embeddings=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
            ),
            rms_norm_eps=1e-5,
            sliding_window=128,
            sliding_window_pattern=2,
            tie_word_embeddings=False,
            num_local_experts=128,
            num_experts_per_tok=4,
            swiglu_limit=7.0,
        ),
        activation=("hidden_act", dict.fromkeys(("silu", "swish"), "swiglu_oai")),
        derived=frozenset(),
        neutral={"attention_bias": (True,), "swiglu_alpha": (1.702,)},
        # Other names of original_max_position_embeddings and num_experts_per_tok.
        unused=frozenset({"initial_context_length", "experts_per_token"}),
        has_layer_types=True,
        gguf_keys={"swiglu_clamp_exp": ("swiglu_limit", 7.0)},
        gguf_window_period=2,
        gguf_yarn_truncate=False,
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
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
_GGUF_EXPERTS = ("llama", "qwen3moe", "gpt-oss")  # architectures whose files can have experts
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_LAYER_TYPES = {_LOCAL, _GLOBAL}


def from_hf(config: Mapping[str, Any]) -> Config:
    """Convert the content of a Hugging Face `config.json` to a `Config`.

    A key with the value null is treated as absent, with two exceptions: a null in a key of
    `_NULLABLE` means that the model has no window or cap, and a `num_key_value_heads` of null means
    the number of heads.

    Args:
        config: The object in the file, key to value.

    Raises:
        ValueError: The model type is unknown, a key is missing or has an invalid value, or a key
            changes the forward pass in a way that this model type does not support.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    non_null = {k: v for k, v in config.items() if v is not None or k in _NULLABLE}
    rest: dict[str, Any] = {**family.hf_defaults, **non_null}
    for key, synonym in (_EXPERT_COUNT, _EXPERT_COUNT[::-1]):
        if key in non_null and key not in family.keys and synonym in family.keys:
            rest[synonym] = rest.pop(key)
    if config.get("num_key_value_heads", 0) is None:  # an absent key may have another default
        rest["num_key_value_heads"] = config.get("num_attention_heads")
    key, kinds_of_mlp = family.activation
    activation = rest.setdefault(key, next(iter(kinds_of_mlp)))
    if not isinstance(activation, str) or activation not in kinds_of_mlp:
        names = " or ".join(map(repr, kinds_of_mlp))
        raise ValueError(f"{key} must be {names}, got {activation!r}")

    fields: dict[str, Any] = dict(family.fixed_fields, mlp=kinds_of_mlp[activation])
    if family.fixed_fields["position"] == "rope":
        num_layers: Any = rest.get("num_hidden_layers")
        check_size("num_hidden_layers", num_layers, MAX_LAYERS)
        _pop_rope(rest, fields, family)
        if family.has_rope_layers:
            fields["rope_layers"] = _pop_rope_layers(rest, num_layers)
        fields["windows"] = _pop_windows(rest, family, num_layers, fields.get("rope_layers"))
    for key, name in family.keys.items():
        if key in rest:
            fields[name] = rest.pop(key)

    unset = {
        name: key
        for key, name in family.keys.items()
        if fields.get(name) is None and key not in _NULLABLE
    }
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
    check_size("head_dim", fields["head_dim"])
    if family.rotary_key is not None:
        fraction = rest.pop(family.rotary_key)
        fields["rotary_dim"] = _rotary_dim(family.rotary_key, fraction, fields["head_dim"])
    cfg = Config(**_with_defaults(fields))
    window = rest.get("sliding_window")
    if rest.get("use_sliding_window") is False or _covers(window, cfg):
        rest.pop("sliding_window", None)  # as in a Qwen2 that was converted to a Llama
    for key in family.unused:
        rest.pop(key, None)
    names = tuple(name for name, mlp in kinds_of_mlp.items() if mlp == cfg.mlp)
    neutral_overrides = dict.fromkeys(config_keys.ACTIVATIONS, names) | dict(family.neutral)
    config_keys.check(rest, cfg, kind, neutral_overrides=neutral_overrides)
    return cfg


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields, with None for each value that is the field's default.

    Then configs of equal decoders are equal, whether or not a file has such a value.
    """
    head_dim = fields["head_dim"]
    defaults = {
        "query_scalar": head_dim,
        "rotary_dim": head_dim,
        "attention_multiplier": head_dim**-0.5,
    }
    return {
        name: None if name in defaults and value == defaults[name] else value
        for name, value in fields.items()
    }


def _rotary_dim(key: str, fraction: Any, head_dim: int) -> int:
    """Return the number of rotated channels of each head, rounded down as in transformers.

    Args:
        key: Key of the fraction in config.json, for error messages.
        fraction: Fraction of the channels that are rotated.
        head_dim: H, the number of channels of a head.
    """
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not is_number or not 0 < fraction <= 1:
        raise ValueError(f"{key} must be a number above 0 and at most 1, got {fraction!r}")
    return int(head_dim * fraction)


def _pop_rope_layers(rest: dict[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Return whether each layer has RoPE (SmolLM3), and remove the keys that say so from `rest`."""
    layers, interval = rest.pop("no_rope_layers", None), rest.pop("no_rope_layer_interval", 4)
    if layers is None:
        check_size("no_rope_layer_interval", interval)
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    is_list = isinstance(layers, list) and len(layers) >= num_layers
    if not is_list or {*map(repr, layers)} - {"0", "1"}:
        raise ValueError(
            f"no_rope_layers must be a list of 1 (with positions) or 0 for each of {num_layers} "
            f"layers, got {layers!r}"
        )
    return tuple(layer == 1 for layer in layers[:num_layers])


def to_hf(cfg: Config) -> dict[str, Any]:
    """Return the content of a `config.json` that `from_hf` converts to an equal config.

    The `model_type` is the first of `FAMILIES` that can represent the config.

    Raises:
        ValueError: No Hugging Face model type can represent this combination of fields.
    """
    lost: dict[str, list[str]] = {}
    for kind, family in FAMILIES.items():
        if not all(getattr(cfg, name) == value for name, value in family.fixed_fields.items()):
            continue
        out = _to_hf(cfg, kind, family)
        try:
            restored = out and from_hf(out)
        except ValueError:
            continue
        if restored == cfg:
            return out
        lost[kind] = [
            field.name
            for field in dataclasses.fields(cfg)
            if getattr(restored, field.name, None) != getattr(cfg, field.name)
        ]
    reasons = "".join(
        f"; the config.json of {kind} cannot represent {', '.join(names)}"
        for kind, names in lost.items()
    )
    raise ValueError(f"no Hugging Face model type matches {cfg}{reasons}")


def _to_hf(cfg: Config, kind: str, family: Family) -> dict[str, Any]:
    """Return the `config.json` of a family for `cfg`, or {} if the family has no such MLP.

    The result can lack fields that the family has no key for.
    """
    key, kinds_of_mlp = family.activation
    activation = next((name for name, mlp in kinds_of_mlp.items() if mlp == cfg.mlp), None)
    if activation is None:
        return {}
    out = {"model_type": kind, "architectures": [family.architecture], key: activation}
    out |= {key: getattr(cfg, name) for key, name in family.keys.items()}
    if out.get("query_pre_attn_scalar", 0) is None:
        out["query_pre_attn_scalar"] = cfg.head_dim
    if out.get("attention_multiplier", 0) is None:
        out["attention_multiplier"] = cfg.head_dim**-0.5
    if cfg.position == "rope":
        out[family.theta_key] = cfg.rope_theta
        if cfg.rope_scaling is None and "rope_parameters" in family.hf_defaults:
            out["rope_parameters"] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        if cfg.rope_scaling is not None:
            scaling = dataclasses.asdict(cfg.rope_scaling)
            out["rope_scaling"] = {"rope_type": scaling.pop("rope_type")} | {
                key: list(value) if isinstance(value := scaling[name], tuple) else value
                for key, name in _SCALING_KEYS.items()
                if scaling[name] is not None
            }
            if not cfg.rope_scaling.truncate:
                out["rope_scaling"]["truncate"] = False
            if "original_max_position_embeddings" in family.hf_defaults:
                length = cfg.rope_scaling.original_max_seq_len
                out["original_max_position_embeddings"] = length
    if family.rotary_key is not None:
        fraction = (cfg.rotary_dim or cfg.head_dim) / cfg.head_dim
        if int(cfg.head_dim * fraction) != (cfg.rotary_dim or cfg.head_dim):  # rounded down
            fraction = math.nextafter(fraction, 1)
        out[family.rotary_key] = fraction
    if family.has_rope_layers:
        out["no_rope_layers"] = [int(cfg.has_rope(i)) for i in range(cfg.num_layers)]
    window = next((window for window in cfg.windows if window is not None), None)
    if "sliding_window" in family.hf_defaults:
        out["sliding_window"] = window
    if "use_sliding_window" in family.hf_defaults:
        out["use_sliding_window"] = window is not None
    if family.has_layer_types:
        out["layer_types"] = [
            _GLOBAL if cfg.window(i) is None else _LOCAL for i in range(cfg.num_layers)
        ]
    return out


def _pop_rope(rest: dict[str, Any], fields: dict[str, Any], family: Family) -> None:
    """Move the RoPE keys of `rest` to `fields`; keys that are not used stay in `rest`.

    transformers 4 wrote the keys `rope_theta` and `rope_scaling`. transformers 5 writes the content
    of both into `rope_parameters`, or into one object per layer type within it if the layer types
    differ. If a file has both forms, `rope_scaling` takes precedence.
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
            raise ValueError(
                "rope_parameters must be one object for all layers in this model type, got one "
                f"object per layer type ({', '.join(rope)})"
            )
        for key, value in rope.items():
            if not isinstance(value, Mapping):
                raise ValueError(f"rope_parameters of {key} must be an object, got {value!r}")
        local = dict(rope.get(_LOCAL, {}))
        if (kind := local.pop("rope_type", "default")) != "default":
            raise ValueError(
                f"rope_type in rope_parameters.{_LOCAL} must be 'default', got {kind!r}"
            )
        rest["rope_local_base_freq"] = local.pop("rope_theta", rest["rope_local_base_freq"])
        rest |= local
        rope = rope.get(_GLOBAL, {})
    rope = {"rope_theta": rest.pop(family.theta_key)} | {
        key: value for key, value in rope.items() if value is not None or key == "factor"
    }
    if family.rotary_key is not None and "partial_rotary_factor" in rope:
        rest[family.rotary_key] = rope.pop("partial_rotary_factor")
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
    """Convert a `rope_scaling` object; return the scaling and the unused keys with their values.

    The optional keys of YaRN are handled as in transformers (`modeling_rope_utils.py`): the default
    of `original_max_position_embeddings` is `max_seq_len`, a factor of null is the ratio of
    `max_seq_len` to it, and `mscale` and `mscale_all_dim` are used if both are present and
    `attention_factor` is not.
    """
    rest = dict(rope)
    old_name = rest.pop("type", None)
    kind: Any = rest.pop("rope_type", old_name)
    factor = rest.get("factor")
    if kind is None and factor in (None, 1):
        kind = "default"
    if kind == "dynamic" and factor == 1:  # no effect on sequences up to the pretraining length
        kind = "default"
    if kind == "su" or (kind == "yarn" and "short_factor" in rest):  # names in older Phi-3 files
        kind = "longrope"
    if kind == "default":
        rest.pop("original_max_position_embeddings", None)  # of a Phi-3 without extended context
        if factor not in (None, 1):
            raise ValueError(f"factor must be absent with rope_type 'default', got {factor!r}")
        return None, rest
    if not isinstance(kind, str) or kind not in ROPE_SCALING_FIELDS:
        known = ", ".join(["default", *ROPE_SCALING_FIELDS])
        raise ValueError(f"rope_type must be one of {known}, got {kind!r}")
    required = {key for key, name in _SCALING_KEYS.items() if name in ROPE_SCALING_FIELDS[kind]}
    if kind == "longrope":
        _complete_longrope(rest, max_seq_len)
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


def _complete_longrope(rope: dict[str, Any], max_seq_len: Any) -> None:
    """Add the attention factor to the keys of LongRoPE, and convert its lists to tuples.

    The attention factor depends on the ratio of the extended to the original context. As in
    transformers, this ratio is `factor` if present, otherwise that of the two lengths.
    """
    original = rope.setdefault("original_max_position_embeddings", max_seq_len)
    for key, number in (
        ("original_max_position_embeddings", original),
        ("max_position_embeddings", max_seq_len),
    ):
        check_size(key, number)
    factor = rope.pop("factor", None)
    if factor is None:
        factor = max_seq_len / original
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"rope_type 'longrope': factor must be positive, got {factor!r}")
    if "attention_factor" not in rope:
        is_longer = factor > 1 and original > 1
        extra = math.log(factor) / math.log(original) if is_longer else 0.0
        rope["attention_factor"] = math.sqrt(1 + extra)
    for key in ("short_factor", "long_factor"):
        if isinstance(value := rope.get(key), list):
            rope[key] = tuple(value)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's multiplier of cosines and sines (arXiv:2309.00071, section 3.4).

    Args:
        factor: Ratio of the extended context to the original one.
        mscale: Coefficient that some models (DeepSeek) add to the formula; 1 as in the paper.

    Returns:
        0.1 * mscale * ln(factor) + 1, or 1 for a factor below 1.
    """
    return 0.1 * mscale * math.log(max(factor, 1)) + 1.0


def _pop_windows(
    rest: dict[str, Any], family: Family, num_layers: int, rope_layers: tuple[bool, ...] | None
) -> tuple[int | None, ...]:
    """Remove the keys of sliding windows from `rest`; return the windows of the layers.

    If `rope_layers` is given and the file has no `layer_types`, the layers without rotation have
    the window, as in transformers.
    """

    def pop(key: str, default: Any) -> Any:  # the default also if the family has no such key
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
        if rope_layers is not None:
            return tuple(None if has_rope else size for has_rope in rope_layers)
        if period is not None:  # Gemma: every second or sixth layer has no window
            return (size,) * (period - 1) + (None,)
        return (None,) * min(num_full, num_layers) + (size,) * max(num_layers - num_full, 0)
    if not isinstance(types, list) or len(types) != num_layers or {*map(str, types)} - _LAYER_TYPES:
        count = f"{len(types)} items: " if isinstance(types, list) else ""
        raise ValueError(
            f"layer_types must be a list of {' or '.join(sorted(_LAYER_TYPES))} for each of "
            f"{num_layers} layers, got {count}{types!r}"
        )
    if _LOCAL in types and size is None:
        raise ValueError(f"layer_types has {_LOCAL}, but sliding_window is absent or disabled")
    return tuple(size if kind == _LOCAL else None for kind in types)


def _covers(window: Any, cfg: Config) -> bool:
    """Return whether a sliding window is at least as long as the context, so it has no effect."""
    return isinstance(window, int) and window >= cfg.max_seq_len


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    has_head: bool,
    rope_factors: Mapping[str, Sequence[float]] | None = None,
) -> Config:
    """Convert the metadata of a GGUF file to a `Config`.

    Args:
        metadata: All key-value pairs of the file.
        has_head: Whether the file has `output.weight`; without it the embeddings are tied.
        rope_factors: Divisors of the rotary frequencies, from the tensors `rope_freqs` (Llama 3),
            `rope_factors_short` and `rope_factors_long` (LongRoPE), if the file has them.

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
    rest, pop = config_keys.read_gguf_section(metadata, kind)
    heads, d_model = pop("attention.head_count"), pop("embedding_length")
    check_size("attention.head_count", heads)
    check_size("embedding_length", d_model)
    tokens = metadata.get("tokenizer.ggml.tokens")
    is_layer_norm = family.fixed_fields["norm"] == "layer"
    fields = dict(
        family.fixed_fields,
        mlp=next(iter(family.activation[1].values())),
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
    check_size("attention.key_length", fields["head_dim"])
    for key, (name, default) in family.gguf_keys.items():
        value = rest.pop(key, default)
        fields[name] = default if value == 0 and not isinstance(value, bool) else value
    if kind in _GGUF_EXPERTS and rest.get("expert_count", 0) not in (0, 1):
        fields["num_experts"] = pop("expert_count")
        check_size(f"{kind}.expert_count", fields["num_experts"])
        fields["num_experts_per_tok"] = pop("expert_used_count")
        fields["norm_topk_prob"] = True  # llama.cpp has no key for it
        fields["d_ff"] = pop("expert_feed_forward_length", fields["d_ff"])
    if fields["position"] == "rope":
        fields["rope_theta"] = pop("rope.freq_base", 10_000.0)
        check_positive(f"{kind}.rope.freq_base", fields["rope_theta"])
        rotated = pop("rope.dimension_count", fields["head_dim"])
        if family.rotary_key is not None:
            fields["rotary_dim"] = rotated
        elif rotated != fields["head_dim"]:
            raise ValueError(
                f"{kind}.rope.dimension_count must be head_dim ({fields['head_dim']}), got "
                f"{rotated}"
            )
        fields["rope_scaling"] = _gguf_scaling(
            rest, fields, rope_factors or {}, family.gguf_yarn_truncate
        )
        fields["rope_layers"] = family.gguf_rope_layers
    if family.gguf_local_rope_theta is not None:
        fields["local_rope_theta"] = pop("rope.freq_base_swa", family.gguf_local_rope_theta)
    if family.gguf_window_period is not None:
        fields["windows"] = _gguf_windows(rest, kind, family, fields["num_layers"])
    if fields["num_layers"] == family.gguf_layers_of_27b:  # as in llama.cpp
        fields["query_scalar"] = d_model // heads
    if (width := pop("attention.value_length", fields["head_dim"])) != fields["head_dim"]:
        raise ValueError(
            f"{kind}.attention.value_length must be head_dim ({fields['head_dim']}), got {width}"
        )
    cfg = Config(**_with_defaults(fields))
    if _covers(rest.get("attention.sliding_window"), cfg):
        del rest["attention.sliding_window"]
    config_keys.check_gguf(rest, cfg, kind)
    return cfg


def _check_single_model(metadata: Mapping[str, Any]) -> None:
    """Reject a file that is not one complete model, and log keys of unknown sections.

    Raises:
        ValueError: The file is an adapter, a vision projector, or a part of a split model.
    """
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


def _gguf_windows(
    rest: dict[str, Any], kind: str, family: Family, num_layers: Any
) -> tuple[int | None, ...]:
    """Return the window of each layer or None, and remove the keys that say so from `rest`.

    The key `attention.sliding_window_pattern` has one flag per layer or a period. With a period of
    n, every n-th layer has no window. A window size of 0 means that no layer has a window. The
    defaults of both keys are those of llama.cpp.
    """
    size = rest.pop("attention.sliding_window", family.gguf_window)
    if size is None:
        raise ValueError(f"the GGUF metadata have no key {kind}.attention.sliding_window")
    if size == 0:
        return (None,)
    if family.gguf_window_period == 1:
        return (size,)
    key = "attention.sliding_window_pattern"
    pattern = rest.pop(key, family.gguf_window_period)
    if isinstance(pattern, list):
        if len(pattern) != num_layers or {*map(repr, pattern)} - {"True", "False", "0", "1"}:
            raise ValueError(
                f"{kind}.{key} must be a number, or a list of true or false for each of "
                f"{num_layers} layers, got {len(pattern)} items: {pattern!r}"
            )
        return tuple(size if is_local else None for is_local in pattern)
    check_size(f"{kind}.{key}", pattern, MAX_LAYERS)
    return (size,) * (pattern - 1) + (None,)


def _gguf_scaling(
    rest: dict[str, Any],
    fields: dict[str, Any],
    factors: Mapping[str, Sequence[float]],
    yarn_truncate: bool,
) -> RopeScaling | None:
    """Return the RoPE scaling of a GGUF file, and remove the keys `rope.scaling.*` from `rest`.

    As in llama.cpp, the default type is linear, and a factor of 0 means 1.

    Args:
        rest: The keys of the architecture that are not used yet.
        fields: Fields of the config that are known already.
        factors: Divisors of the rotary frequencies by tensor name, see `from_gguf`.
        yarn_truncate: `truncate` of a YaRN scaling.
    """
    tables = {
        "short_factor": factors.get("rope_factors_short"),
        "long_factor": factors.get("rope_factors_long"),
    }
    is_long = any(table is not None for table in tables.values())
    kind = rest.pop("rope.scaling.type", "longrope" if is_long else "linear")
    factor = rest.pop("rope.scaling.factor", 0) or 1
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    for key, name in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if value := rest.pop(f"rope.scaling.{key}", None):
            rope[name] = value
    if kind == "longrope":
        rope |= {key: list(table) for key, table in tables.items() if table is not None}
        rope["attention_factor"] = rest.pop("rope.scaling.attn_factor", 1)
        return _parse_scaling(rope, fields["max_seq_len"])[0]
    if is_long:
        raise ValueError(
            f"rope.scaling.type must be 'longrope' or absent in a file with the tensors "
            f"rope_factors_short and rope_factors_long, got {kind!r}"
        )
    frequencies = factors.get("rope_freqs")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None if frequencies is None else _llama3_scaling(frequencies, fields)
    if frequencies is not None:
        raise ValueError(
            "rope.scaling.type must be 'none' in a file with the tensor rope_freqs.weight, got "
            f"{kind!r}"
        )
    if kind == "yarn" and isinstance(factor, int | float):
        rope["truncate"] = yarn_truncate
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
    """Return the Llama 3 scaling that gives the divisors `factors` of the rotary frequencies.

    GGUF files store the divisors but not the parameters of the scaling. In all published models,
    three of the parameters are the same, and the factor is the largest divisor.
    """
    head_dim, theta = fields["head_dim"], fields["rope_theta"]
    scaling = RopeScaling(
        rope_type="llama3",
        factor=round(max(factors), 3),  # the value in the file is a rounded float32
        original_max_seq_len=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    expected = []
    for i in range(head_dim // 2 if head_dim // 2 == len(factors) else 0):
        # Rotations of the pair within the original context.
        num_rotations = 8192 / (2 * math.pi * theta ** (2 * i / head_dim))
        unscaled = min(max((num_rotations - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / (unscaled + (1 - unscaled) / scaling.factor))
    is_match = len(expected) == len(factors) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, factors, strict=True)
    )
    if not is_match:
        raise ValueError(
            "rope_freqs.weight: expected the divisors of Llama 3's RoPE scaling with a factor of "
            f"{scaling.factor}, got other values, which are not supported"
        )
    return scaling
