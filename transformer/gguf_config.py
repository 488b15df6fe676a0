"""Convert the metadata of a GGUF file to a `Config`.

`families.FAMILIES` has the keys of each architecture. A key that changes the forward pass in an
unsupported way raises ValueError; other unknown keys are ignored and logged (`config_keys.py` has
the list). Follows the key list of ggml's docs/gguf.md, and the defaults of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformer import config_keys
from transformer.config import MAX_LAYERS, Config, RopeScaling, check_positive, check_size
from transformer.families import FAMILIES, Family
from transformer.hf_config import covers_context, parse_scaling, with_defaults, yarn_mscale

_GGUF_EXPERTS = ("llama", "qwen3moe", "gpt-oss")  # architectures whose files can have experts


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
    cfg = Config(**with_defaults(fields))
    if covers_context(rest.get("attention.sliding_window"), cfg):
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
        return parse_scaling(rope, fields["max_seq_len"])[0]
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
    return parse_scaling(rope, fields["max_seq_len"])[0]


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
