"""How each published family of decoders writes its config: `config.json` and GGUF metadata.

One row of `FAMILIES` a family: the forms that define it, and what its keys are called. A key that
changes the forward pass in a way the family lacks raises; other unknown keys are passed over and
logged (`config_keys.py` has the list). Follows the configuration classes of transformers 5 (and
what older files wrote) and the key list of ggml's docs/gguf.md.

Leaves out: the vision towers of larger Gemma 3 models, mixtures of experts, and scaling of rotary
positions other than linear, Llama 3's and YaRN.
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
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")  # one function
_QK_NORM = dict.fromkeys(("qk_norm", "use_qk_norm"), (True,))


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is particular to one `model_type`."""

    architecture: str  # the class of transformers that opens it
    gguf: str  # its name in GGUF files
    fixed_fields: Mapping[str, Any]
    keys: Mapping[str, str]  # key of config.json -> field
    hf_defaults: Mapping[str, Any]  # what transformers takes where config.json is silent
    activation: tuple[str, tuple[str, ...]]  # key, and the names of the one function
    derived: frozenset[str] = frozenset({"head_dim"})  # fields that may follow from others
    neutral: Mapping[str, tuple] = field(default_factory=dict)  # instead of `config_keys.CONFIG`'s


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
    "mistral": Family(  # its GGUF files do not record the window and are read as llama
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
        # Its queries, keys and values have biases whatever these say.
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
    """Reads the dictionary of a Hugging Face `config.json`.

    A key that is null counts as absent, but for two: a `sliding_window` of null means no window,
    `num_key_value_heads` of null means as many as heads.

    Raises:
        ValueError: the model type is unknown, a key is missing or has a value that cannot be, or a
            key changes the forward pass in a way this model type lacks.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    stated = {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
    given = {**family.hf_defaults, **stated}
    if config.get("num_key_value_heads", 0) is None:  # unlike absent, where the default may differ
        given["num_key_value_heads"] = config.get("num_attention_heads")
    key, names = family.activation
    if given.setdefault(key, names[0]) not in names:
        raise ValueError(f"{key} must be {' or '.join(map(repr, names))}, got {given[key]!r}")

    fields: dict[str, Any] = dict(family.fixed_fields)
    if family.fixed_fields["position"] == "rope":
        _pop_rope(given, fields)
        layers = given.get("num_hidden_layers")
        check_size("num_hidden_layers", layers, MAX_LAYERS)
        fields["windows"] = _pop_windows(given, family, layers)
    for key, name in family.keys.items():
        if key in given:
            fields[name] = given.pop(key)

    lacking = {name: key for key, name in family.keys.items() if fields.get(name) is None}
    if missing := [key for name, key in lacking.items() if name not in family.derived]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for name in ("num_heads", "d_model"):
        check_size(name, fields[name])
    follows = {
        "num_kv_heads": fields["num_heads"],
        "head_dim": fields["d_model"] // fields["num_heads"],
        "d_ff": 4 * fields["d_model"],
    }
    for name in family.derived:
        if fields.get(name) is None:
            fields[name] = follows[name]
    if fields.get("query_scalar") == fields["head_dim"]:
        fields["query_scalar"] = None  # which is what it means by default
    cfg = Config(**fields)
    window = given.get("sliding_window")
    if given.get("use_sliding_window") is False or _covers(window, cfg):
        given.pop("sliding_window", None)  # as in a Qwen2 that was rewritten as a Llama
    own = dict.fromkeys(config_keys.ACTIVATIONS, names) | dict(family.neutral)
    config_keys.check(given, cfg, kind, neutral_overrides=own)
    return cfg


def to_hf(cfg: Config) -> dict[str, Any]:
    """The `config.json` dictionary that `from_hf` reads back to this very config.

    Raises:
        ValueError: no Hugging Face model type has this combination of forms.
    """
    kinds = [
        kind
        for kind, family in FAMILIES.items()
        if all(getattr(cfg, name) == value for name, value in family.fixed_fields.items())
    ]
    if not kinds:
        raise ValueError(f"no Hugging Face model type has the forms of {cfg}")
    # Llama and Mistral differ in the window alone.
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
    if (back := from_hf(out)) != cfg:
        lost = [
            f.name for f in dataclasses.fields(cfg) if getattr(back, f.name) != getattr(cfg, f.name)
        ]
        raise ValueError(f"the config.json of {kind} has no place for {', '.join(lost)} of {cfg}")
    return out


def _pop_rope(given: dict[str, Any], fields: dict[str, Any]) -> None:
    """Moves what `given` says of rotary positions to `fields`; keys that go unused stay in `given`.

    transformers 4 wrote `rope_theta` beside `rope_scaling`; 5 writes both into `rope_parameters`,
    or, where they differ, one such object for each kind of layer. An older key wins.
    """
    if given.get("rope_scaling") is False:  # none, as in transformers
        del given["rope_scaling"]
    objects = {}
    for key in ("rope_scaling", "rope_parameters"):
        objects[key] = value = given.pop(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be an object, got {value!r}")
    rope = objects["rope_scaling"] or objects["rope_parameters"]
    if rope and rope.keys() <= _LAYER_TYPES:
        if "rope_local_base_freq" not in given:
            raise ValueError("rope_parameters differ by layer, which this model type does not do")
        for key, value in rope.items():
            if not isinstance(value, Mapping):
                raise ValueError(f"rope_parameters of {key} must be an object, got {value!r}")
        local = dict(rope.get(_LOCAL, {}))
        if (kind := local.pop("rope_type", "default")) != "default":
            raise ValueError(f"rope_parameters of {_LOCAL} must be 'default', got {kind!r}")
        given["rope_local_base_freq"] = local.pop("rope_theta", given["rope_local_base_freq"])
        given |= local
        rope = rope.get(_GLOBAL, {})
    rope = {"rope_theta": given.pop("rope_theta")} | {
        key: value for key, value in rope.items() if value is not None or key == "factor"
    }
    fields["rope_theta"] = rope.pop("rope_theta")
    original = given.pop("original_max_position_embeddings", None)  # as Phi-3 writes it; it wins
    if original is not None:
        rope["original_max_position_embeddings"] = original
    fields["rope_scaling"], unused = _scaling(rope, given.get("max_position_embeddings"))
    for key, value in unused.items():
        given.setdefault(key if key in config_keys.CONFIG else f"rope_scaling.{key}", value)


def _scaling(
    given: dict[str, Any], max_seq_len: Any
) -> tuple[RopeScaling | None, Mapping[str, Any]]:
    """The scaling that a `rope_scaling` object asks for, and the keys that it does not use.

    Reads YaRN's optional keys as transformers does (`modeling_rope_utils.py`): the original length
    is by default `max_seq_len`, a factor of null is the ratio of the two, and `mscale` and
    `mscale_all_dim` count where both are given and `attention_factor` is not.
    """
    given = dict(given)
    old_name = given.pop("type", None)
    kind = given.pop("rope_type", old_name)
    factor = given.get("factor")
    if kind is None and factor in (None, 1):
        kind = "default"
    if kind == "dynamic" and factor == 1:  # leaves the trained length as it is, and adds none
        kind = "default"
    if kind == "default":
        if factor not in (None, 1):
            raise ValueError(f"rope_type 'default' has no factor, got {factor!r}")
        return None, given
    if not isinstance(kind, str) or kind not in ROPE_SCALING_FIELDS:
        known = ", ".join(["default", *ROPE_SCALING_FIELDS])
        raise ValueError(f"rope_type must be one of {known}, got {kind!r}")
    wanted = {key for key, name in _SCALING_KEYS.items() if name in ROPE_SCALING_FIELDS[kind]}
    more: dict[str, Any] = {}
    if "original_max_position_embeddings" in wanted:
        given.setdefault("original_max_position_embeddings", max_seq_len)
    if kind == "yarn" and "factor" in given:
        if factor is None:
            original = given["original_max_position_embeddings"]
            check_size("original_max_position_embeddings", original)
            check_size("max_position_embeddings", max_seq_len)
            given["factor"] = factor = max_seq_len / original
        mscales = [given.pop(key, None) for key in ("mscale", "mscale_all_dim")]
        if "attention_factor" not in given and isinstance(factor, int | float):
            if not all(isinstance(m, int | float | None) for m in mscales):
                raise ValueError(f"mscale and mscale_all_dim must be numbers, got {mscales}")
            top, bottom = mscales if all(mscales) else (1.0, 0.0)
            given["attention_factor"] = yarn_mscale(factor, top) / yarn_mscale(factor, bottom)
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            given[key] = given.get(key) or default
        more["truncate"] = given.pop("truncate", True)
    if missing := [key for key in _SCALING_KEYS if key in wanted - given.keys()]:
        raise ValueError(f"rope_type {kind!r} lacks {', '.join(missing)}")
    more |= {_SCALING_KEYS[key]: given.pop(key) for key in wanted}
    return RopeScaling(rope_type=kind, **more), given


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN sharpens scores for a context `factor` times as long (arXiv:2309.00071)."""
    return 0.1 * mscale * math.log(max(factor, 1)) + 1.0


def _pop_windows(given: dict[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Removes what `given` says of sliding windows, and returns it as a pattern over the layers."""

    def take(key: str, default: Any) -> Any:  # a key that this family has
        return given.pop(key) if key in family.hf_defaults else default

    size, num_full = take("sliding_window", None), take("max_window_layers", 0)
    if not take("use_sliding_window", True):
        size = None  # Qwen states a window and switches it off
    if size is not None:
        check_size("sliding_window", size)
    every = take("sliding_window_pattern", None)
    if every is not None:
        every = given.pop("_sliding_window_pattern", every)  # as transformers writes it
        check_size("sliding_window_pattern", every, MAX_LAYERS)
    if (types := given.pop("layer_types", None)) is None:
        if size is None:
            return (None,)
        if every is not None:  # Gemma 3: each sixth layer sees everything
            return (size,) * (every - 1) + (None,)
        return (None,) * min(num_full, num_layers) + (size,) * max(num_layers - num_full, 0)
    if not isinstance(types, list) or len(types) != num_layers or {*map(str, types)} - _LAYER_TYPES:
        raise ValueError(
            f"layer_types must say {' or '.join(sorted(_LAYER_TYPES))} for each of {num_layers} "
            f"layers, got {types!r}"
        )
    if _LOCAL in types and size is None:
        raise ValueError(f"layer_types says {_LOCAL}, but no sliding_window is in use")
    return tuple(size if kind == _LOCAL else None for kind in types)


def _covers(window: Any, cfg: Config) -> bool:
    """Whether a sliding window is as long as the longest text, and so changes nothing."""
    return isinstance(window, int) and window >= cfg.max_seq_len


def from_gguf(
    metadata: Mapping[str, Any], *, has_head: bool, rope_factors: Sequence[float] | None = None
) -> Config:
    """Reads the metadata of a GGUF file.

    Args:
        metadata: the key-value section of the file.
        has_head: whether the file holds `output.weight`; without it the embeddings are tied.
        rope_factors: `rope_freqs.weight`, where the file has it: what each rotary frequency is
            divided by.

    Raises:
        ValueError: an unknown architecture, a missing key, or a key that changes the forward pass
            in a way this decoder lacks.
    """
    _check_one_model(metadata)
    kind = metadata.get("general.architecture")
    known = {family.gguf: family for family in reversed(FAMILIES.values())}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"general.architecture must be one of {sorted(known)}, got {kind!r}")
    family = known[kind]
    own = {
        key.removeprefix(f"{kind}."): value
        for key, value in metadata.items()
        if key.startswith(f"{kind}.")
    }

    def take(key: str, default: Any = None) -> Any:
        value = own.pop(key, default)
        if value is None:
            raise ValueError(f"the GGUF metadata lacks {kind}.{key}")
        return value

    heads, d_model = take("attention.head_count"), take("embedding_length")
    check_size("attention.head_count", heads)
    check_size("embedding_length", d_model)
    tokens = metadata.get("tokenizer.ggml.tokens")
    is_layer_norm = family.fixed_fields["norm"] == "layer"
    fields = dict(
        family.fixed_fields,
        num_layers=take("block_count"),
        num_heads=heads,
        num_kv_heads=take("attention.head_count_kv", heads),
        head_dim=take("attention.key_length", d_model // heads),
        d_model=d_model,
        d_ff=take("feed_forward_length"),
        vocab_size=take("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        max_seq_len=take("context_length"),
        norm_eps=take(f"attention.layer_norm_{'' if is_layer_norm else 'rms_'}epsilon"),
        tie_embeddings=not has_head,
    )
    if fields["position"] == "rope":
        fields["rope_theta"] = take("rope.freq_base", 10_000.0)
        if (rotated := take("rope.dimension_count", fields["head_dim"])) != fields["head_dim"]:
            raise ValueError(f"{kind}.rope.dimension_count must be head_dim, got {rotated}")
        fields["rope_scaling"] = _gguf_scaling(own, fields, rope_factors)
    if kind == "gemma3":
        fields["local_rope_theta"] = take("rope.freq_base_swa", 10_000.0)
        fields["windows"] = _gguf_windows(own, take("attention.sliding_window"))
        if fields["num_layers"] == 62:  # the 27B model; no key says so, llama.cpp knows it too
            fields["query_scalar"] = d_model // heads
    if (width := take("attention.value_length", fields["head_dim"])) != fields["head_dim"]:
        raise ValueError(f"{kind}.attention.value_length must be head_dim, got {width}")
    cfg = Config(**fields)
    if _covers(own.get("attention.sliding_window"), cfg):
        del own["attention.sliding_window"]
    config_keys.check_gguf(own, cfg, kind)
    return cfg


def _check_one_model(metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter, a projector or a part of a split model; log keys of unknown sections."""
    if (content := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"general.type must be 'model', got {content!r}")
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count > 1:
        raise ValueError(
            f"split.count is {count!r}: this file is one part of a split model; join the parts "
            "with llama-gguf-split --merge"
        )
    sections = {"general", "tokenizer", "split", "quantize", "imatrix", "GGUF"}
    sections.add(str(metadata.get("general.architecture")))
    others = sorted(key for key in metadata if key.partition(".")[0] not in sections)
    config_keys.log_ignored_keys("GGUF metadata", tuple(others))


def _gguf_windows(own: dict[str, Any], size: int) -> tuple[int | None, ...]:
    """Gemma 3: a flag a layer, or every how many layers one sees everything."""
    pattern = own.pop("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        return tuple(size if is_local else None for is_local in pattern)
    check_size("attention.sliding_window_pattern", pattern, MAX_LAYERS)
    return (size,) * (pattern - 1) + (None,)


def _gguf_scaling(
    own: dict[str, Any], fields: dict[str, Any], factors: Sequence[float] | None
) -> RopeScaling | None:
    """The scaling that the keys `rope.scaling.*`, or Llama 3's table of factors, ask for.

    Reads them as llama.cpp does: the type is by default linear, a factor of 0 means 1.
    """
    kind = own.pop("rope.scaling.type", "linear")
    factor = own.pop("rope.scaling.factor", 0) or 1
    given: dict[str, Any] = {"rope_type": kind, "factor": factor}
    for key, name in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if value := own.pop(f"rope.scaling.{key}", None):
            given[name] = value
    if kind == "none" or (kind == "linear" and factor == 1):
        return None if factors is None else _llama3_scaling(factors, fields)
    if factors is not None:
        raise ValueError(f"rope.scaling.type must be none beside rope_freqs.weight, got {kind!r}")
    if kind == "yarn" and isinstance(factor, int | float):
        sharpening = own.pop("rope.scaling.attn_factor", 1)
        if not isinstance(sharpening, int | float):
            raise ValueError(f"rope.scaling.attn_factor must be a number, got {sharpening!r}")
        given["attention_factor"] = yarn_mscale(factor) * sharpening
        # Without effect in llama.cpp where it is 1 or what YaRN says by itself.
        stated = own.get("rope.scaling.yarn_attn_factor")
        if isinstance(stated, float) and math.isclose(stated, yarn_mscale(factor), rel_tol=1e-6):
            del own["rope.scaling.yarn_attn_factor"]
    return _scaling(given, fields["max_seq_len"])[0]


def _llama3_scaling(factors: Sequence[float], fields: Mapping[str, Any]) -> RopeScaling:
    """Recognises Llama 3's scaling by the table that it makes.

    GGUF files hold the table and not the numbers behind it; all published models used the same
    three, and a factor that is the largest in the table.
    """
    head_dim, theta = fields["head_dim"], fields["rope_theta"]
    scaling = RopeScaling(
        rope_type="llama3",
        factor=round(max(factors), 3),  # from a float32 that may be a hair off
        original_max_seq_len=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    expected = []
    for i in range(head_dim // 2):
        turns = 8192 / (2 * math.pi * theta ** (2 * i / head_dim))  # within the first context
        keep = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / (keep + (1 - keep) / scaling.factor))
    same = len(expected) == len(factors) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, factors, strict=True)
    )
    if not same:
        raise ValueError(
            "rope_freqs.weight is not the table that Llama 3's scaling makes; no other is known"
        )
    return scaling
