"""Convert `config.json` of a Hugging Face folder to a `Config`, and back.

`families.FAMILIES` has the keys of each `model_type`. A key that changes the forward pass in an
unsupported way raises ValueError; other unknown keys are ignored and logged (`config_keys.py` has
the list). Follows the configuration classes of transformers 5, and the spellings of older files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from transformer import config_keys
from transformer.config import MAX_LAYERS, ROPE_SCALING_FIELDS, Config, RopeScaling, check_size
from transformer.families import FAMILIES, Family

_EXPERT_COUNT = ("num_experts", "num_local_experts")  # synonyms in families with experts
# Keys whose null means that the model has no window or cap; a missing key has a default instead.
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
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
    cfg = Config(**with_defaults(fields))
    window = rest.get("sliding_window")
    if rest.get("use_sliding_window") is False or covers_context(window, cfg):
        rest.pop("sliding_window", None)  # as in a Qwen2 that was converted to a Llama
    for key in family.unused:
        rest.pop(key, None)
    names = tuple(name for name, mlp in kinds_of_mlp.items() if mlp == cfg.mlp)
    neutral_overrides = dict.fromkeys(config_keys.ACTIVATIONS, names) | dict(family.neutral)
    config_keys.check(rest, cfg, kind, neutral_overrides=neutral_overrides)
    return cfg


def with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
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
    fields["rope_scaling"], unused = parse_scaling(rope, rest.get("max_position_embeddings"))
    for key, value in unused.items():
        rest.setdefault(key if key in config_keys.CONFIG else f"rope_scaling.{key}", value)


def parse_scaling(
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


def covers_context(window: Any, cfg: Config) -> bool:
    """Return whether a sliding window is at least as long as the context, so it has no effect."""
    return isinstance(window, int) and window >= cfg.max_seq_len
