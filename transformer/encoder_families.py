"""Published encoder families: how their `config.json` and GGUF metadata become fields of `Config`.

`FAMILIES` has one row per `model_type`: the names of its keys, the defaults of transformers for
keys that a file lacks, and the fields that have the same value in the whole family. `families.py`
is the same for decoders. Follows the configuration classes of transformers 5, the files of nomic-ai
(whose code comes with their weights), and llama.cpp's converter.

    BERT             learned positions, post-norm, GELU (Devlin et al. 2018, arXiv:1810.04805)
    RoBERTa, XLM-R   BERT whose positions begin after the id of padding (Liu et al. 2019,
                     arXiv:1907.11692; Conneau et al. 2019, arXiv:1911.02116)
    nomic            BERT with rotary positions and SwiGLU (Nussbaum et al. 2024, arXiv:2402.01613)
    ModernBERT       rotary positions, pre-norm, GeGLU, windows in two layers of three (Warner et
                     al. 2024, arXiv:2412.13663)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformer import config_keys
from transformer.config import MAX_LAYERS, check_size

_GELU: tuple[str, ...] = (
    "gelu",
    "gelu_python",
)  # both names mean the exact GELU, computed with erf
_SILU: tuple[str, ...] = ("silu", "swish")
_BERT_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "type_vocab_size": "num_types",
    "layer_norm_eps": "norm_eps",
}
_MODERNBERT_KEYS = {
    key: name for key, name in _BERT_KEYS.items() if name not in ("num_types", "norm_eps")
} | {"norm_eps": "norm_eps", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_NOMIC_KEYS = {  # of the files of nomic-ai; transformers writes BERT's keys
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "d_model",
    "n_inner": "d_ff",
    "vocab_size": "vocab_size",
    "n_positions": "max_seq_len",
    "type_vocab_size": "num_types",
    "layer_norm_epsilon": "norm_eps",
    "rotary_emb_base": "rope_theta",
}
# The defaults of transformers for keys that config.json lacks, as in Google's first files.
_BERT_DEFAULTS = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
_BIDIRECTIONAL = {
    "is_decoder": (False,),
    "is_causal": (False,),
    "causal": (False,),
    "use_bidirectional_attention": (True,),
}
_POST_NORM: dict[str, tuple[Any, ...]] = {
    "pre_norm": (False,),
    "prenorm": (False,),
    "do_layer_norm_before": (False,),
}
_NEUTRAL = config_keys.LAYER_NORM | _BIDIRECTIONAL | _POST_NORM
_ROTARY_NEUTRAL = _BIDIRECTIONAL | {
    "position_embedding_type": ("rope", "rotary", "absolute"),  # absolute: ModernBERT's own files
    "norm_type": config_keys.LAYER_NORM["norm_type"],
    "rmsnorm": (False,),
    "use_rms_norm": (False,),
    "norm_bias": (True, False),  # the loader looks for the tensors
}


class Fields(NamedTuple):
    """The fields of `Config` that a config.json sets, and its unused keys."""

    fields: dict[str, Any]  # of `Config`
    rest: dict[str, Any]  # the unused keys and their values
    neutral: dict[str, tuple[Any, ...]]  # values of unused keys that do not change the forward pass


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """Properties of one `model_type`.

    Attributes:
        keys: key of config.json -> field of `Config`.
        defaults: values of keys that config.json lacks.
        fixed_fields: fields that are equal in all models of the family.
        activations: key of the activation, and a mapping: accepted name -> value of the field
            `mlp`.
        neutral: key -> values that do not change the forward pass, where they differ from those in
            `config_keys.CONFIG`.
        head: fields of `HeadConfig` for the family's `ForSequenceClassification`; empty if that is
            not supported.
    """

    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed_fields: Mapping[str, Any]
    activations: tuple[str, Mapping[str, str]]
    neutral: Mapping[str, tuple[Any, ...]]
    head: Mapping[str, Any] = field(default_factory=dict)


_BERT = EncoderFamily(
    keys=_BERT_KEYS,
    defaults=_BERT_DEFAULTS,
    fixed_fields={},
    activations=("hidden_act", dict.fromkeys(_GELU, "gelu")),
    neutral=_NEUTRAL,
    head={"activation": "tanh"},
)
_ROBERTA = EncoderFamily(
    keys=_BERT_KEYS,
    defaults=_BERT_DEFAULTS | {"pad_token_id": 1},
    fixed_fields={},
    activations=_BERT.activations,
    neutral=_NEUTRAL,
    head={"activation": "tanh"},
)
_ROTARY_POST_NORM = dict(position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False)
_NOMIC = EncoderFamily(
    keys=_BERT_KEYS | {"rope_theta": "rope_theta"},
    defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "silu",
              "max_position_embeddings": 2048, "rope_theta": 1000.0},
    fixed_fields=_ROTARY_POST_NORM,
    activations=("hidden_act", dict.fromkeys(_SILU, "swiglu")),
    neutral=_ROTARY_NEUTRAL | _POST_NORM,
)  # fmt: skip
_NOMIC_AI = EncoderFamily(  # model_type nomic_bert too, with the keys of GPT-2
    keys=_NOMIC_KEYS,
    defaults={"layer_norm_epsilon": 1e-12, "type_vocab_size": 2, "rotary_emb_base": 10_000.0},
    fixed_fields=_ROTARY_POST_NORM,
    activations=("activation_function", {"swiglu": "swiglu"}),
    neutral=_ROTARY_NEUTRAL
    | _POST_NORM
    | {
        "rotary_emb_fraction": (1,),
        "rotary_scaling_factor": (),
        **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), (False,)),
        "num_experts": (0,),
        "moe_every_n_layers": (0,),
        "num_shared_experts": (0,),
    },
)
_MODERNBERT = EncoderFamily(
    keys=_MODERNBERT_KEYS,
    defaults={"norm_eps": 1e-5, "hidden_activation": "gelu", "local_attention": 128,
              "attention_bias": False, "mlp_bias": False, "global_attn_every_n_layers": 3,
              "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
    fixed_fields=dict(position="rope", num_types=0, pre_norm=True),
    activations=(
        "hidden_activation",
        {**dict.fromkeys(_GELU, "geglu"), **dict.fromkeys(_SILU, "swiglu")},
    ),
    neutral=_ROTARY_NEUTRAL,
    head={"activation": "gelu", "has_norm": True},
)  # fmt: skip
FAMILIES: dict[str, EncoderFamily] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "nomic_bert": _NOMIC,
    "modernbert": _MODERNBERT,
}
_MODERNBERT_UNUSED = frozenset(
    """
    deterministic_flash_attn sparse_prediction sparse_pred_ignore_index decoder_bias mlp_dropout
    embedding_dropout initializer_cutoff_factor reference_compile repad_logits_with_grad
    gradient_checkpointing layer_norm_eps classifier_bias classifier_activation classifier_pooling
    """.split()  # noqa: SIM905
)


def fields_from_hf(config: Mapping[str, Any]) -> Fields:
    """Return the fields of `Config` that a Hugging Face `config.json` sets, and its unused keys.

    Raises:
        ValueError: The model type is unknown, or a key is missing or has an invalid value.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(FAMILIES)}, got {kind!r}")
    family = _NOMIC_AI if kind == "nomic_bert" and "n_embd" in config else FAMILIES[kind]
    present = {key: value for key, value in config.items() if value is not None}
    if family is _NOMIC:
        _pop_rope(present, {"rope_theta": "rope_theta"})
    if kind == "modernbert":
        # transformers 5 has one object per type of layer, earlier versions two keys.
        thetas = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
        _pop_rope(present, thetas)
    rest: dict[str, Any] = {**family.defaults, **present}
    if missing := [key for key in family.keys if key not in rest]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    fields = dict(family.fixed_fields) | {name: rest.pop(key) for key, name in family.keys.items()}
    key, names = family.activations
    if not isinstance(rest.get(key), str) or rest[key] not in names:
        raise ValueError(f"{key} must be {' or '.join(map(repr, names))}, got {rest.get(key)!r}")
    fields["mlp"] = names[rest.pop(key)]
    if family is _ROBERTA:
        _set_position_offset(fields, rest["pad_token_id"])
    if family is _NOMIC:
        head_dim = rest.pop("head_dim", None)
        if head_dim is not None and head_dim * fields["num_heads"] != fields["d_model"]:
            raise ValueError(f"head_dim must be hidden_size / num_attention_heads, got {head_dim}")
    if kind == "modernbert":
        fields["windows"] = _pop_windows(rest, fields["num_layers"])
        fields["rope_theta"] = rest.pop("global_rope_theta")
        fields["local_rope_theta"] = rest.pop("local_rope_theta")
        for key in _MODERNBERT_UNUSED:
            rest.pop(key, None)
    same_activation = [name for name, mlp in names.items() if mlp == fields["mlp"]]
    neutral = dict.fromkeys(config_keys.ACTIVATIONS, tuple(same_activation))
    return Fields(fields, rest, neutral | dict(family.neutral))


def head_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the fields of `HeadConfig` and the pooling of a `...ForSequenceClassification`.

    Args:
        config: Content of config.json.

    Raises:
        ValueError: The head of this model type is not supported, or a key has an invalid value.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or not family.head:
        known = sorted(name for name, family in FAMILIES.items() if family.head)
        raise ValueError(f"model_type of a cross-encoder must be one of {known}, got {kind!r}")
    labels: Any = config.get("num_labels")
    if labels is None:
        names = config.get("id2label")
        labels = len(names) if isinstance(names, Mapping) and names else 2  # as in transformers
    check_size("num_labels", labels, 10_000)
    fields: dict[str, Any] = dict(family.head) | {"num_labels": labels}
    pooling = "cls"
    if kind == "modernbert":
        pooling = config.get("classifier_pooling", "cls")
        if pooling not in ("cls", "mean"):
            raise ValueError(f"classifier_pooling must be 'cls' or 'mean', got {pooling!r}")
        if (name := config.get("classifier_activation", "gelu")) not in _GELU:
            raise ValueError(f"classifier_activation must be 'gelu', got {name!r}")
        fields["has_bias"] = bool(config.get("classifier_bias", False))
    return fields, pooling


def _set_position_offset(fields: dict[str, Any], padding: Any) -> None:
    """Set `position_offset` and reduce `max_seq_len` in `fields`, as RoBERTa's positions need.

    The first rows of its position table, up to the row of the padding id, are unused.
    """
    if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
        raise ValueError(f"pad_token_id must be an integer of at least 0, got {padding!r}")
    check_size("max_position_embeddings", fields["max_seq_len"])
    if fields["max_seq_len"] <= padding + 1:
        raise ValueError(
            f"max_position_embeddings must be more than pad_token_id + 1, got "
            f"{fields['max_seq_len']} and {padding}"
        )
    fields["position_offset"] = padding + 1
    fields["max_seq_len"] -= padding + 1


def _pop_rope(rest: dict[str, Any], thetas: Mapping[str, str]) -> None:
    """Move each `rope_theta` of the object `rope_parameters` to a key of config.json.

    Args:
        rest: The keys of config.json, changed in place.
        thetas: Layer type in the object -> key for its theta; or "rope_theta" -> key, if the object
            has one theta for all layers.

    Raises:
        ValueError: RoPE is scaled, or the object does not have this structure.
    """
    value = rest.pop("rope_parameters", None) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {value!r}")
    if "rope_theta" in thetas:
        value = {"rope_theta": value}
    if unknown := sorted(map(str, value.keys() - thetas.keys())):
        raise ValueError(f"rope_parameters must have {' and '.join(thetas)}, got {unknown[0]!r}")
    for name, entry in value.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"rope_parameters.{name} must be an object, got {entry!r}")
        entry = dict(entry)
        theta, kind = entry.pop("rope_theta", None), entry.pop("rope_type", "default")
        if entry.get("partial_rotary_factor") == 1:
            del entry["partial_rotary_factor"]
        if kind != "default" or any(item is not None for item in entry.values()):
            raise ValueError(
                f"rope_parameters.{name} must be unscaled (rope_type 'default'), "
                f"got {dict(value[name])!r}"
            )
        if theta is not None:
            rest[thetas[name]] = theta


def _pop_windows(rest: dict[str, Any], num_layers: Any) -> tuple[int | None, ...]:
    """Remove the keys of ModernBERT's windows from `rest`; return each layer's window or None."""
    check_size("num_hidden_layers", num_layers, MAX_LAYERS)
    width, period = rest.pop("local_attention"), rest.pop("global_attn_every_n_layers")
    check_size("local_attention", width)
    check_size("global_attn_every_n_layers", period)
    kinds = rest.pop("layer_types", None)
    rest.pop("sliding_window", None)  # half of local_attention, written by some versions
    if kinds is None:
        kinds = ["sliding_attention" if i % period else "full_attention" for i in range(num_layers)]
    known = {"sliding_attention": max(width // 2, 1), "full_attention": None}
    if not isinstance(kinds, list) or len(kinds) != num_layers or {*map(str, kinds)} - known.keys():
        raise ValueError(
            f"layer_types must be a list of {' or '.join(known)} for each of {num_layers} layers, "
            f"got {kinds!r}"
        )
    return tuple(known[kind] for kind in kinds)


# general.architecture -> fixed fields. llama.cpp stores RoBERTa and XLM-R as "bert", with the
# position table cut to the rows in use.
GGUF_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {},
    "nomic-bert": dict(position="rope", mlp="swiglu"),
    "modern-bert": dict(position="rope", mlp="geglu", num_types=0, pre_norm=True),
}
_GGUF_POOLING = {1: "mean", 2: "cls", 3: "lasttoken"}
_GGUF_RANK = 4  # the pooling type of a reranker
_NO_DECODER_RERANKER = "a reranker that is a decoder is not supported"
_GGUF_HEADS: dict[str, dict[str, Any]] = {
    "bert": dict(_ROBERTA.head),
    "modern-bert": dict(_MODERNBERT.head),
}


def gguf_pooling(metadata: Mapping[str, Any]) -> str | None:
    """Return the pooling mode in GGUF metadata, or None if the model does not embed texts.

    Raises:
        ValueError: The pooling is not supported.
    """
    kind = metadata.get("general.architecture")
    value = metadata.get(f"{kind}.pooling_type")
    if (labels := f"{kind}.classifier.output_labels") in metadata:
        raise ValueError(f"{labels}: {_NO_DECODER_RERANKER}")
    if value is None:
        return "mean" if kind in GGUF_ARCHITECTURES else None
    if value not in _GGUF_POOLING:
        raise ValueError(
            f"{kind}.pooling_type must be 1 (mean), 2 (cls) or 3 (last), got {value!r}"
            + (f": {_NO_DECODER_RERANKER}" if value == _GGUF_RANK else "")
        )
    return _GGUF_POOLING[value]


def is_gguf_cross_encoder(metadata: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a GGUF file has an encoder with a head, which scores pairs of texts.

    llama.cpp's converter writes no pooling type for such a model, and versions before 2025 no
    labels either, so the tensors of the head decide too.

    Args:
        metadata: The key-value section of the file.
        names: Names of the tensors.
    """
    kind = metadata.get("general.architecture")
    return kind in GGUF_ARCHITECTURES and (
        f"{kind}.classifier.output_labels" in metadata
        or metadata.get(f"{kind}.pooling_type") == _GGUF_RANK
        or any(name.startswith("cls.") for name in names)
    )


def head_fields_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], str]:
    """Return the fields of `HeadConfig` and the pooling of a cross-encoder in a GGUF file.

    Args:
        metadata: The key-value section of the file.
        shapes: Shape of each tensor.

    Raises:
        ValueError: The head is not supported, or a key has an invalid value.
    """
    kind = metadata["general.architecture"]
    if kind not in _GGUF_HEADS:
        raise ValueError(
            f"general.architecture of a cross-encoder must be one of {sorted(_GGUF_HEADS)}, got "
            f"{kind!r}"
        )
    if "cls.weight" not in shapes:
        raise ValueError(
            "the tensor cls.weight of the cross-encoder's head is missing: llama.cpp's converter "
            "drops the pooler of a BERT, so scores would not be those of the model; use its "
            "safetensors"
        )
    if kind == "bert" and "token_types.weight" not in shapes:
        raise ValueError(
            "the tensor token_types.weight is missing, as in a DistilBERT, whose head is not "
            "supported"
        )
    num_labels = shapes.get("cls.output.weight", (1,))[0]
    labels = metadata.get(key := f"{kind}.classifier.output_labels")
    if labels is not None and (not isinstance(labels, list) or len(labels) != num_labels):
        count = len(labels) if isinstance(labels, list) else "no"
        raise ValueError(
            f"{key} must have a name for each of the {num_labels} rows of cls.output.weight, got "
            f"{count} names"
        )
    value = metadata.get(key := f"{kind}.classifier.pooling_type", 2)
    if value not in (1, 2):
        raise ValueError(f"{key} must be 1 (mean) or 2 (cls), got {value!r}")
    pooling_type = metadata.get(f"{kind}.pooling_type", _GGUF_RANK)
    if pooling_type not in (value, _GGUF_RANK):
        raise ValueError(
            f"{kind}.pooling_type of a cross-encoder must be {_GGUF_RANK} (rank) or absent, got "
            f"{pooling_type!r}"
        )
    head = _GGUF_HEADS[kind] | {"num_labels": num_labels, "has_bias": "cls.bias" in shapes}
    return head, _GGUF_POOLING[value]


def fields_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of `Config` that the metadata of a GGUF file sets, and the unused keys.

    Args:
        metadata: The key-value section of the file.
        shapes: Shape of each tensor, for the vocabulary size and for which biases exist.

    Returns:
        The fields of `Config`, and the unused keys without the prefix of the architecture.

    Raises:
        ValueError: The architecture is unknown, or a key is missing or has an invalid value.
    """
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"general.architecture must be one of {sorted(GGUF_ARCHITECTURES)}, got {kind!r}"
        )
    rest, pop = config_keys.read_gguf_section(metadata, kind)
    for key in ("pooling_type", "classifier.output_labels", "classifier.pooling_type"):
        rest.pop(key, None)
    rest.pop("vocab_size", None)  # the shape of the embedding has it
    if pop("attention.causal", False):
        raise ValueError(f"{kind}.attention.causal must be false for an encoder, got true")
    fields = GGUF_ARCHITECTURES[kind] | dict(
        num_layers=pop("block_count"),
        num_heads=pop("attention.head_count"),
        d_model=pop("embedding_length"),
        d_ff=pop("feed_forward_length"),
        max_seq_len=pop("context_length"),
        norm_eps=pop("attention.layer_norm_epsilon"),
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        attention_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
    )
    if pop("attention.head_count_kv", fields["num_heads"]) != fields["num_heads"]:
        raise ValueError(
            f"{kind}.attention.head_count_kv must equal {kind}.attention.head_count: grouped-query "
            "attention is not supported"
        )
    if kind == "bert":
        # The table can have fewer rows than context_length.
        fields["max_seq_len"] = shapes.get("position_embd.weight", (0,))[0]
    if kind != "modern-bert":
        fields["num_types"] = shapes.get("token_types.weight", (0,))[0]
    if fields.get("position") == "rope":
        fields["rope_theta"] = pop("rope.freq_base", 10_000.0)
        if rest.pop("rope.scaling.type", "none") != "none":
            raise ValueError(
                f"{kind}.rope.scaling.type must be 'none': RoPE scaling is not supported here"
            )
    if kind == "modern-bert":
        names = _MODERNBERT.activations[1]
        if (name := pop("hidden_activation", "gelu")) not in names:
            raise ValueError(f"{kind}.hidden_activation must be one of {sorted(names)}, got {name}")
        fields["mlp"] = names[name]
        fields["local_rope_theta"] = pop("rope.freq_base_swa", 10_000.0)
        period = pop("attention.sliding_window_pattern", 3)
        windows = {
            "local_attention": pop("attention.sliding_window"),
            "global_attn_every_n_layers": 3 if isinstance(period, list) else period,
        }
        if isinstance(period, list):
            names = ("full_attention", "sliding_attention")
            windows["layer_types"] = [names[bool(is_local)] for is_local in period]
        fields["windows"] = _pop_windows(windows, fields["num_layers"])
    return fields, rest
