"""What one decoder differs in from another: sizes and a few choices of form.

One frozen dataclass describes GPT-2, the Llama family (SmolLM2 among it) and Qwen2. It is hashable,
so `jax.jit` takes it as a static argument and compiles one program for each distinct config.

Leaves out: RoPE scaling, sliding windows, mixtures of experts. A checkpoint that asks for one of
them is refused by name rather than run wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Keys of a Hugging Face config.json that say nothing about what the forward pass computes.
_SILENT_KEYS = frozenset(
    """
    _name_or_path architectures attention_dropout attn_pdrop bos_token_id chunk_size_feed_forward
    dtype embd_pdrop eos_token_id id2label initializer_range is_llama_config label2id
    max_window_layers model_type output_attentions output_hidden_states pad_token_id pretraining_tp
    problem_type resid_pdrop return_dict summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params torch_dtype
    transformers.js_config transformers_version use_cache
    """.split()  # noqa: SIM905 (a list of words reads better than forty quotes)
)

# Keys that would change the forward pass, with the only values for which this decoder is right.
_FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "activation_function": ("gelu_new",),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "rope_interleaved": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}


_SIZES = (
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_model",
    "d_ff",
    "vocab_size",
    "max_seq_len",
)


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and forms of a decoder-only transformer.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    num_layers: int
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key-value heads; N is a multiple of K
    head_dim: int  # H
    d_model: int  # D
    d_ff: int  # F
    vocab_size: int  # V
    max_seq_len: int  # positions the model was trained for
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0  # used when position == "rope"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    linear_bias: bool = False  # biases on the attention output and on both MLP projections
    tie_embeddings: bool = True  # logits use the embedding table

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name, choices in (
            ("norm", ("rms", "layer")),
            ("position", ("rope", "learned")),
            ("mlp", ("swiglu", "gelu")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("qkv_bias", "linear_bias", "tie_embeddings"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")

    @classmethod
    def debug(cls, **changes: Any) -> Config:
        """A decoder under 50,000 weights, for tests; `changes` replace its fields."""
        small: dict[str, Any] = dict(
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            d_model=32,
            d_ff=48,
            vocab_size=320,
            max_seq_len=1024,
        )
        return cls(**(small | changes))

    @property
    def num_params(self) -> int:
        """Weights of the whole model, the table counted once when it is tied."""
        d, heads, kv = (
            self.d_model,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        norm = d * (2 if self.norm == "layer" else 1)
        attn = d * (heads + 2 * kv) + heads * d
        mlp = d * self.d_ff * (3 if self.mlp == "swiglu" else 2)
        bias = (heads + 2 * kv) * self.qkv_bias
        bias += (d + d + self.d_ff * (2 if self.mlp == "swiglu" else 1)) * self.linear_bias
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        tables += self.max_seq_len * d * (self.position == "learned")
        return self.num_layers * (attn + mlp + bias + 2 * norm) + norm + tables

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads the dictionary of a Hugging Face `config.json` (model_type gpt2, llama or qwen2).

        Raises:
            ValueError: the model type, a key, or a value is one whose meaning this decoder lacks.
        """
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in _HF_FIELDS:
            raise ValueError(f"model_type must be one of {sorted(_HF_FIELDS)}, got {kind!r}")
        names, forms = _HF_FIELDS[kind]
        given = {**_HF_DEFAULTS[kind], **config}
        # transformers 5 nests theta: {"rope_type": "default", "rope_theta": 1e5}.
        rope = given.pop("rope_parameters", None)
        if rope is not None:
            known = isinstance(rope, Mapping) and set(rope) <= {"rope_type", "rope_theta"}
            if not known or rope.get("rope_type") != "default":
                raise ValueError(f"rope_parameters must be of rope_type 'default', got {rope!r}")
            given["rope_theta"] = rope.get("rope_theta", given.get("rope_theta"))
        layer_types = given.pop("layer_types", None)
        if layer_types is not None and not (
            isinstance(layer_types, list) and set(map(str, layer_types)) == {"full_attention"}
        ):
            raise ValueError(f"layer_types must all be 'full_attention', got {layer_types!r}")
        if not given.get("use_sliding_window", True):
            given.pop("sliding_window", None)  # Qwen2 states a window and switches it off

        if (context := given.pop("n_ctx", given.get("n_positions"))) != given.get("n_positions"):
            raise ValueError(f"n_ctx must equal n_positions, got {context!r}")

        fields: dict[str, Any] = dict(forms)
        for key, value in given.items():
            if key in names:
                fields[names[key]] = value
            elif key in _FIXED_KEYS:
                if value not in _FIXED_KEYS[key]:
                    allowed = " or ".join(map(repr, _FIXED_KEYS[key]))
                    raise ValueError(f"{key} must be {allowed} for {kind}, got {value!r}")
            elif key not in _SILENT_KEYS:
                raise ValueError(f"config.json has the key {key!r}, whose meaning is not known")
        missing = [key for key, name in names.items() if fields.get(name) is None]
        missing = [
            key for key in missing if key not in ("head_dim", "num_key_value_heads", "n_inner")
        ]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        for name in ("num_heads", "d_model"):
            _check_size(name, fields[name])
        if fields.get("num_kv_heads") is None:
            fields["num_kv_heads"] = fields["num_heads"]
        if fields.get("head_dim") is None:
            fields["head_dim"] = fields["d_model"] // fields["num_heads"]
        if fields.get("d_ff") is None:
            fields["d_ff"] = 4 * fields["d_model"]
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` dictionary that `from_hf` reads back to this very config.

        Raises:
            ValueError: no Hugging Face model type has this combination of forms.
        """
        kinds = [
            kind
            for kind, (_, forms) in _HF_FIELDS.items()
            if all(getattr(self, name) == value for name, value in forms.items())
        ]
        if not kinds:
            raise ValueError(f"no Hugging Face model type has the forms of {self}")
        (kind,) = kinds
        names, _ = _HF_FIELDS[kind]
        architecture = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
        out = {
            "model_type": kind,
            "architectures": [architecture.get(kind, "Qwen2ForCausalLM")],
            **({"activation_function": "gelu_new"} if kind == "gpt2" else {"hidden_act": "silu"}),
            **{key: getattr(self, name) for key, name in names.items()},
        }
        if (back := Config.from_hf(out)) != self:
            lost = [
                f.name
                for f in dataclasses.fields(self)
                if getattr(back, f.name) != getattr(self, f.name)
            ]
            raise ValueError(
                f"the config.json of {kind} has no place for {', '.join(lost)} of {self}"
            )
        return out

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, has_head: bool) -> Config:
        """Reads the metadata of a GGUF file (architecture gpt2, llama or qwen2).

        Args:
            metadata: the key-value section of the file.
            has_head: whether the file holds `output.weight`; without it the embeddings are tied.

        Raises:
            ValueError: an unknown architecture, a missing key, or a key that changes the forward
                pass in a way this decoder lacks.
        """
        kind = metadata.get("general.architecture")
        if not isinstance(kind, str) or kind not in _HF_FIELDS:
            raise ValueError(
                f"general.architecture must be one of {sorted(_HF_FIELDS)}, got {kind!r}"
            )
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
        _check_size("attention.head_count", heads)
        _check_size("embedding_length", d_model)
        tokens = metadata.get("tokenizer.ggml.tokens")
        _, forms = _HF_FIELDS[kind]
        norm = (
            "attention.layer_norm_rms_epsilon"
            if forms["norm"] == "rms"
            else ("attention.layer_norm_epsilon")
        )
        fields = dict(
            num_layers=take("block_count"),
            num_heads=heads,
            num_kv_heads=take("attention.head_count_kv", heads),
            head_dim=take("attention.key_length", d_model // heads),
            d_model=d_model,
            d_ff=take("feed_forward_length"),
            vocab_size=take("vocab_size", len(tokens) if isinstance(tokens, list) else None),
            max_seq_len=take("context_length"),
            norm_eps=take(norm),
            tie_embeddings=not has_head,
        )
        if forms["position"] == "rope":
            fields["rope_theta"] = take("rope.freq_base", 10_000.0)
            if (rotated := take("rope.dimension_count", fields["head_dim"])) != fields["head_dim"]:
                raise ValueError(f"{kind}.rope.dimension_count must be head_dim, got {rotated}")
        if (width := take("attention.value_length", fields["head_dim"])) != fields["head_dim"]:
            raise ValueError(f"{kind}.attention.value_length must be head_dim, got {width}")
        if own:
            raise ValueError(f"GGUF keys whose meaning is not known: {sorted(own)}")
        return cls(**fields, **forms)


_LLAMA_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_embeddings",
}
# model_type -> (config.json key -> field, the forms that define the family)
_HF_FIELDS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "llama": (
        _LLAMA_NAMES,
        dict(norm="rms", position="rope", mlp="swiglu", qkv_bias=False, linear_bias=False),
    ),
    "qwen2": (
        _LLAMA_NAMES,
        dict(norm="rms", position="rope", mlp="swiglu", qkv_bias=True, linear_bias=False),
    ),
    "gpt2": (
        {
            "n_layer": "num_layers",
            "n_head": "num_heads",
            "n_embd": "d_model",
            "n_inner": "d_ff",
            "vocab_size": "vocab_size",
            "n_positions": "max_seq_len",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        dict(norm="layer", position="learned", mlp="gelu", qkv_bias=True, linear_bias=True),
    ),
}
# What transformers assumes where a config.json is silent.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(rope_theta=10_000.0, tie_word_embeddings=False, rms_norm_eps=1e-6),
    "qwen2": dict(rope_theta=10_000.0, tie_word_embeddings=False, rms_norm_eps=1e-6),
    "gpt2": dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5),
}
