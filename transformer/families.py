"""The published decoder families: a table of the choices in `Config` that make each one.

`FAMILIES` has one entry per `model_type`: the fields of `Config` that define the family, and the
names of its keys in `config.json` and GGUF files. `hf_config.py` and `gguf_config.py` read these.

Not supported: the vision encoders of larger Gemma 3 models, shared experts (Qwen2-MoE, DeepSeek),
and RoPE scaling other than linear, Llama 3's, YaRN and LongRoPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformer import config_keys

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
_EXPERT_KEYS = {"num_experts_per_tok": "num_experts_per_tok"}
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
