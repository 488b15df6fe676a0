"""Check the keys of a model file that no field of `Config` reads: some change the forward pass.

transformers ignores every key of `config.json` that a model's class does not know. That is right
for `unsloth_fixed`, but silently wrong for Granite's `residual_multiplier` in a file with
`model_type` llama. The table below therefore lists each key that changes the forward pass in some
family, with its neutral values, which have no effect:

- A key in the table with another value is rejected with its name.
- A key outside the table is ignored, as transformers does, and logged once.

Keys that only refine a feature (`num_experts_per_tok`) are left out: the key that switches the
feature on (`num_experts`) is listed. The checkpoint loader checks weights by name and shape, so a
feature with tensors of its own is rejected even if its key is not in the table.

Compiled from the configuration and modelling files of transformers 5, from models whose code comes
with their weights (MiniCPM, Qwen 1, BTLM, ChatGLM, MPT), and for GGUF from the key names of
llama.cpp (`llama-arch.cpp`, gguf-py's `constants.py`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger(__name__)


def _inverse_root_of_head_dim(cfg: Any) -> float:
    return cfg.head_dim**-0.5


def _head_dim(cfg: Any) -> int:
    return cfg.head_dim


def _d_model(cfg: Any) -> int:
    return cfg.d_model


def _vocab_size(cfg: Any) -> int | None:
    return getattr(cfg, "vocab_size", None)


def _root_of_num_layers(cfg: Any) -> float | None:
    num_layers = getattr(cfg, "num_layers", None)  # Whisper counts encoder and decoder layers
    return None if num_layers is None else num_layers**0.5


def _rope_theta(cfg: Any) -> float | None:
    return getattr(cfg, "rope_theta", None)


# Effect of a group of keys -> each key -> its neutral values: constants, or functions of the
# config. null is neutral for every key, and so is a list of neutral values.
_GROUPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "multiplies embeddings, the residual stream or logits by a constant": {
        "embedding_multiplier": (1,),  # Granite, Falcon-H1
        "residual_multiplier": (1,),
        "logits_scaling": (1,),  # divides
        "logit_scale": (1,),  # Cohere
        "lm_head_multiplier": (1,),
        "attention_in_multiplier": (1,),
        "attention_out_multiplier": (1,),
        "mlp_multipliers": (1,),
        "scale_emb": (1,),  # MiniCPM
        "scale_depth": (_root_of_num_layers,),  # divided by that root
        "dim_model_base": (_d_model,),  # logits are divided by d_model / dim_model_base
        "embedding_scale": (1,),
        "scale_embedding": (False,),  # BART, Whisper: by the root of d_model
        "scale_embeddings": (False,),
        "rescale_embeddings": (False,),
        "embeddings_scale": (1,),  # BTLM, Jais
        "width_scale": (1,),
        "output_alpha": (1,),
        "mup_embeddings_scale": (1,),
        "mup_width_scale": (1,),
        "mup_output_alpha": (1,),
        "mup_enabled": (False,),
        "mup_use_scaling": (False,),  # Phi-3-small
        "mup_width_multiplier": (1,),
        "mup_embedding_multiplier": (1,),
        "logits_mup_width_multiplier": (1,),
        "full_attn_alpha_factor": (1,),  # MiniMax
        "full_attn_beta_factor": (1,),
        "linear_attn_alpha_factor": (1,),
        "linear_attn_beta_factor": (1,),
        "mlp_alpha_factor": (1,),
        "mlp_beta_factor": (1,),
        "rescale_every": (0,),  # RWKV
        "residual_scale": (1,),
        "output_multiplier": (1,),
        "residual_gate_temperature": (),
    },
    "scales attention scores or values": {
        "attention_multiplier": (_inverse_root_of_head_dim,),  # Granite
        "softmax_scale": (_inverse_root_of_head_dim,),
        "query_pre_attn_scalar": (_head_dim,),  # Gemma
        "key_multiplier": (1,),
        "attention_value_scale": (1,),
        "scale_attn_weights": (True,),  # GPT-2
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_qk_dot_by_d": (False,),  # BTLM
        "mup_scale_qk_dot_by_d": (False,),
        "mup_attn_multiplier": (1,),
        "qk_scale_factor": (1,),
        "use_logn_attn": (False,),  # Qwen 1
        "log_scaling_alpha": (0,),
        "attn_temperature_tuning": (False, 0),  # Llama 4
        "attn_scale": (0,),
    },
    "caps or clips values": {
        "attn_logit_softcapping": (),  # Gemma 2
        "final_logit_softcapping": (),
        "logits_soft_cap": (),
        "output_logit_soft_cap": (),
        "gate_soft_cap": (),
        "mlp_gate_softcap": (),
        "mlp_up_softcap": (),
        "swiglu_limit": (),  # gpt-oss
        "swiglu_alpha": (),
        "attention_logit_cap": (),
        "unpadded_vocab_size": (_vocab_size,),  # tokens from there on get no logit
        "clip_qkv": (0,),  # OLMo; 0 as MPT reads it
        "qk_l2_clip_threshold": (),
        "activation_sparsity_pattern": (0,),  # Gemma 3n
    },
    "rotates a part of each head only, or otherwise than by rope_theta": {
        "partial_rotary_factor": (1,),  # Phi, StableLM
        "rotary_pct": (1,),
        "rope_pct": (1,),
        "rotary_percent": (1,),
        "rotary_percentage": (1,),
        "rotary_emb_fraction": (1,),  # nomic
        "rotary_scaling_factor": (),
        "rotary_dim": (_head_dim,),  # GPT-J
        "rotary_emb_base": (_rope_theta,),  # GPT-NeoX
        "rotary_emb_scale_base": (),  # xPos
        "rope_ratio": (1,),  # ChatGLM
        "rope_interleave": (False,),
        "rope_interleaved": (False,),
        "rotary_interleaved": (False,),
        "rotary_value": (False,),
        "use_dynamic_ntk": (False,),
        "use_rotary_embedding": (True,),
        "use_long_context": (False,),
        "use_mrope": (False,),
        "mrope_section": (),
        "layer_rope_theta": (_rope_theta,),
        "global_rope_theta": (_rope_theta,),
        "no_rope_layers": (1,),  # SmolLM3, Llama 4: 0 where a layer has no positions
        "no_rope_layer_interval": (0,),
        "nope_layer_interval": (0,),
        "qk_rope_head_dim": (_head_dim,),
        "short_factor": (),  # of rope_scaling: LongRoPE
        "long_factor": (),
        "llama_4_scaling_beta": (0,),
    },
    "encodes positions in another way": {
        "position_embedding_type": ("rope", "rotary"),
        "alibi": (False,),
        "use_alibi": (False,),
        "learned_pos_emb": (False,),
        "use_learned_position_embeddings": (False,),
        "relative_attention": (False,),
        "rope_scaling": ({}, False),  # where positions are learned
        "rope_parameters": ({},),
    },
    "changes which positions a query sees": {
        "sliding_window": (0, -1),  # no window, where a family has no such key
        "sliding_window_size": (),
        "attention_window_size": (),
        "window_size": (-1,),  # [-1, -1] is flash attention's spelling of no window
        "local_attention": (),
        "attention_chunk_size": (),  # Llama 4
        "local_attention_window_len": (),
        "keep_window_size": (),
        "attention_types": (),  # GPT-Neo
        "attention_layers": ("global",),
        "attention_type": ("original_full",),  # BigBird
        "attn_type": ("multihead_attention",),
        "attention_k_eq_v": (False,),
        "layer_types": ("full_attention", "attention"),
        "layers_block_type": ("attention",),
        "block_types": ("attention",),
        "use_bidirectional_attention": (False,),
        "is_causal": (True,),
        "causal": (True,),
        "prefix_lm": (False,),
        "is_decoder": (True, False),  # a decoder is causal either way
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "cross_attention_layers": (),
        "num_kv_shared_layers": (0,),
        "cla_share_factor": (1,),
        "index_topk": (0,),  # DeepSeek 3.2
    },
    "adds biases": {
        "attention_bias": (False,),
        "attention_out_bias": (False,),
        "use_attention_bias": (False,),
        "qkv_bias": (False,),
        "value_bias": (False,),
        "use_qkv_bias": (False,),
        "add_qkv_bias": (False,),
        "mlp_bias": (False,),
        "qkv_proj_bias": (False,),  # nomic
        "mlp_fc1_bias": (False,),
        "mlp_fc2_bias": (False,),
        "use_bias": (False,),
        "bias": (False,),
        "enable_bias": (False,),
        "add_bias_linear": (False,),
        "no_bias": (True,),
        "norm_bias": (False,),
        "lm_head_bias": (False,),
    },
    "adds, moves or changes norms": {
        "use_qk_norm": (False,),  # Cohere
        "qk_norm": (False,),
        "qk_layernorm": (False,),  # Phi, StableLM
        "use_qk_layernorm": (False,),
        "qk_ln": (False,),
        "parallel_attn": (False,),  # Falcon
        "parallel_residual": (False,),
        "use_parallel_residual": (False,),  # GPT-NeoX
        "apply_residual_connection_post_layernorm": (False,),
        "do_layer_norm_before": (True,),  # OPT
        "pre_norm": (True,),
        "prenorm": (True,),
        "use_post_norm": (False,),
        "use_sandwich_norm": (False,),
        "post_layer_norm": (True,),  # ChatGLM: a norm after the last layer
        "_remove_final_layer_norm": (False,),
        "layernorm_embedding": (False,),
        "layer_norm_elementwise_affine": (True,),
        "norm_type": ("rms", "rmsnorm", "rms_norm", "RMSNorm"),
        "rmsnorm": (True,),
        "use_rms_norm": (True,),
    },
    "changes the activation of the MLP": {
        "hidden_act": (),
        "hidden_activation": (),
        "activation_function": (),
        "activation": (),
        "mlp_hidden_act": (),  # Nemotron-H
    },
    "chooses the layers with experts": {
        "decoder_sparse_step": (1,),  # Qwen MoE
        "mlp_only_layers": (),
        "first_k_dense_replace": (0,),  # DeepSeek
        "moe_layer_freq": (1,),
        "interleave_moe_layer_step": (1,),  # Llama 4
    },
    "replaces or adds blocks": {
        "gating": (False,),
        "use_attention_gate": (False,),
        "use_double_wide_mlp": (False,),
        "num_experts": (0, 1),  # Qwen MoE
        "num_local_experts": (0, 1),  # Mixtral
        "n_routed_experts": (0, 1),  # DeepSeek
        "moe_num_experts": (0, 1),
        "moe_every_n_layers": (0,),
        "n_shared_experts": (0,),
        "num_shared_experts": (0,),
        "enable_moe_block": (False,),
        "is_moe": (False,),
        "kv_lora_rank": (0,),  # multi-head latent attention
        "q_lora_rank": (0,),
        "v_head_dim": (_head_dim,),
        "multi_query": (False,),  # Falcon
        "multi_query_attention": (False,),
        "new_decoder_architecture": (False,),
        "num_attention_heads_per_layer": (),
        "per_layer_config": ({},),
        "block_configs": (),  # Nemotron NAS
        "pruned_heads": ({},),
        "embedding_size": (_d_model,),  # ELECTRA
        "word_embed_proj_dim": (_d_model,),  # OPT
        "hidden_size_per_layer_input": (0,),  # Gemma 3n
        "altup_num_inputs": (0, 1),
        "laurel_rank": (0,),
        "mamba_d_state": (0,),
        "ssm_state_size": (0,),
        "state_size": (0,),
        "H_cycles": (1,),
        "attn_config": ({},),  # MPT, DBRX
        "ffn_config": ({},),
        "text_config": ({},),  # of a model with vision or audio
        "vision_config": ({},),
        "audio_config": ({},),
        "use_weighted_layer_sum": (False,),
    },
}
_GGUF_GROUPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "multiplies embeddings, the residual stream or logits by a constant": {
        "embedding_scale": (0, 1),
        "residual_scale": (0, 1),
        "logit_scale": (0, 1),
        "rescale_every_n_layers": (0,),
    },
    "scales attention scores or values": {
        "attention.scale": (0, _inverse_root_of_head_dim),
        "attention.output_scale": (0, 1),
        "attention.value_scale": (0, 1),
        "attention.temperature_scale": (0,),
        "attention.temperature_length": (0,),
    },
    "caps or clips values": {
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
        "attention.clamp_kqv": (0,),
        "swiglu_clamp_exp": (0,),
        "swiglu_clamp_shexp": (0,),
        "activation_sparsity_scale": (0,),
    },
    "rotates a part of each head only, or otherwise than by rope.freq_base": {
        "rope.dimension_sections": (0,),
        "rope.dimension_count_swa": (_head_dim,),
        "rope.freq_base_swa": (_rope_theta,),
        "rope.scale_linear": (0, 1),
        "rope.scaling.alpha": (0,),
        "rope.scaling.attn_factor": (1,),
        "rope.scaling.yarn_attn_factor": (1,),
        "rope.scaling.yarn_ext_factor": (-1, 1),
        "rope.scaling.yarn_log_multiplier": (0,),
        "attention.rope_pattern": (True, 1),
        "attention.compress_rope_freq_base": (),
    },
    "encodes positions in another way": {
        "attention.max_alibi_bias": (0,),
        "attention.relative_buckets_count": (0,),
    },
    "changes which positions a query sees": {
        "attention.causal": (True,),
        "attention.sliding_window": (0,),
        "attention.shared_kv_layers": (0,),
        "attention.recurrent_layers": (False, 0),
        "attention.indexer.top_k": (0,),
        "full_attention_interval": (0, 1),
    },
    "changes the layout of a block": {
        "use_parallel_residual": (False,),
        "swin_norm": (False,),
        "hidden_activation": (),
        "attention.group_norm_groups": (0,),
        "attention.q_lora_rank": (0,),
        "attention.kv_lora_rank": (0,),
        "attention.key_length_mla": (0,),
        "attention.key_length_swa": (_head_dim,),
        "attention.value_length_swa": (_head_dim,),
        "embedding_length_per_layer_input": (0,),
        "embedding_length_out": (0, _d_model),
        "altup.num_inputs": (0, 1),
        "num_loops": (0, 1),
        "hyper_connection.count": (0, 1),
        "adapters.count": (0,),
        "n_deepstack_layers": (0,),
    },
    "replaces or adds blocks": {
        "expert_count": (0, 1),
        "expert_shared_count": (0,),
        "leading_dense_block_count": (0,),
        "interleave_moe_layer_step": (0,),
        "moe_every_n_layers": (0,),
        "ssm.state_size": (0,),
        "wkv.head_size": (0,),
        "shortconv.l_cache": (0,),
        "decoder_block_count": (0,),
    },
}
CONFIG = {key: (effect, values) for effect, keys in _GROUPS.items() for key, values in keys.items()}
GGUF = {
    key: (effect, values) for effect, keys in _GGUF_GROUPS.items() for key, values in keys.items()
}

# Neutral values of a model with layer norms, biases and learned positions, such as GPT-2 and BERT.
# They replace the values in the table, which are those of a Llama.
LAYER_NORM: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", "learned", "learned_absolute"),
    "norm_type": ("layer", "layernorm", "layer_norm", "LayerNorm"),
    "rmsnorm": (False,),
    **dict.fromkeys(("learned_pos_emb", "use_learned_position_embeddings"), (True,)),
    **dict.fromkeys(("use_bias", "bias", "enable_bias", "add_bias_linear", "norm_bias"), (True,)),
    **dict.fromkeys(("attention_bias", "attention_out_bias", "use_attention_bias"), (True,)),
    **dict.fromkeys(("qkv_bias", "use_qkv_bias", "add_qkv_bias", "mlp_bias"), (True,)),
    "no_bias": (False,),
}
ACTIVATIONS = tuple(_GROUPS["changes the activation of the MLP"])

# Keys that transformers writes into the files of all models and that do not affect the forward
# pass: training, classification heads, generation defaults. They are ignored without a log line.
_EXPECTED = frozenset(
    """
    _name_or_path name_or_path _commit_hash architectures auto_map model_type task_specific_params
    transformers_version torch_dtype dtype use_cache tie_word_embeddings initializer_range
    attention_dropout attention_probs_dropout_prob attn_pdrop embd_pdrop resid_pdrop hidden_dropout
    hidden_dropout_prob classifier_dropout chunk_size_feed_forward gradient_checkpointing
    pretraining_tp bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id
    decoder_start_token_id num_labels id2label label2id problem_type finetuning_task
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 tokenizer_class
    prefix cache_implementation is_llama_config transformers.js_config summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj n_ctx
    reorder_and_upcast_attn max_window_layers use_sliding_window sliding_window_pattern
    _sliding_window_pattern _attn_implementation_autoset attn_implementation _attn_implementation
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id forced_decoder_ids
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    tf_legacy_loss tie_encoder_decoder cross_attention_hidden_size rope_scaling.finetuned
    dropout activation_dropout encoder_layerdrop decoder_layerdrop init_std apply_spec_augment
    mask_time_prob mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length
    mask_feature_min_masks classifier_proj_size num_hidden_layers median_filter_width lang_ids
    suppress_ids suppress_ids_begin router_aux_loss_coef output_router_logits router_jitter_noise
    """.split()  # noqa: SIM905 (a list of words reads better than a hundred quotes)
)
_GGUF_EXPECTED = frozenset(
    """
    expert_used_count tensor_data_layout rope.scaling.finetuned
    """.split()  # noqa: SIM905
)


def read_gguf_section(
    metadata: Mapping[str, Any], kind: str
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Return the GGUF keys of an architecture without its prefix, and a function `pop`.

    `pop(key, default)` removes a key from them and returns its value, or the default if the key is
    missing. It raises ValueError if the key is missing and there is no default.

    Args:
        metadata: All key-value pairs of a GGUF file.
        kind: The architecture, which is the prefix of its keys.
    """
    section = {
        key.removeprefix(f"{kind}."): value
        for key, value in metadata.items()
        if key.startswith(f"{kind}.")
    }

    def pop(key: str, default: Any = None) -> Any:
        value = section.pop(key, default)
        if value is None:
            raise ValueError(f"the GGUF metadata have no key {kind}.{key}")
        return value

    return section, pop


def check(
    rest: Mapping[str, Any],
    cfg: Any,
    kind: str,
    *,
    neutral_overrides: Mapping[str, tuple[Any, ...]] | None = None,
) -> None:
    """Check the keys of a `config.json` that the config reader has not used.

    Args:
        rest: The keys and their values.
        cfg: The config made from the other keys, for neutral values that depend on it.
        kind: The model type, for error messages.
        neutral_overrides: Key -> values that do not change the forward pass of this model type,
            where they differ from those in `CONFIG`.

    Raises:
        ValueError: The weights are quantized in an unsupported format, or a key changes the
            forward pass in a way that this model type does not support.
    """
    check_quantization(rest)
    rest = {key: value for key, value in rest.items() if key not in _QUANTIZATION}
    if rest.get("attn_temperature_tuning") in (False, 0):
        rest.pop("attn_scale", None)  # only used with attn_temperature_tuning
    if rest.get("no_rope_layers"):
        rest.pop("no_rope_layer_interval", None)  # only used where no_rope_layers is absent
    table = CONFIG | {
        key: (CONFIG.get(key, ("chooses the layers with experts", ()))[0], values)
        for key, values in (neutral_overrides or {}).items()
    }
    _check(rest, table, _EXPECTED, cfg, kind, "config.json")


def check_quantization(config: Mapping[str, Any]) -> None:
    """Check that a `config.json` does not describe quantized weights.

    Raises:
        ValueError: It describes quantized weights, in a format that is not supported.
    """
    for key in _QUANTIZATION:
        if (value := config.get(key)) and not _is_disabled(value):
            raise ValueError(f"{key} is {_method(value)}: {_QUANTIZED_ADVICE}")


def check_gguf(rest: Mapping[str, Any], cfg: Any, kind: str) -> None:
    """Check the keys of GGUF metadata that the config reader has not used.

    Args:
        rest: The keys, without the architecture prefix, and their values.
        cfg: The config made from the other keys, for neutral values that depend on it.
        kind: The architecture, for error messages.

    Raises:
        ValueError: A key changes the forward pass in a way that this architecture does not support.
    """
    _check(rest, GGUF, _GGUF_EXPECTED, cfg, kind, "GGUF metadata", prefix=f"{kind}.")


def log_ignored_keys(source: str, keys: tuple[str, ...]) -> None:
    """Log that keys of `source` are ignored, once for each set of keys."""
    if keys:
        _log_ignored_keys_once(source, keys)


@functools.lru_cache(maxsize=256)
def _log_ignored_keys_once(source: str, keys: tuple[str, ...]) -> None:
    names = ", ".join(map(repr, keys[:20])) + (f" and {len(keys) - 20} more" * (len(keys) > 20))
    log.warning("%s: ignoring unknown keys that are assumed to have no effect: %s", source, names)


def _check(
    rest: Mapping[str, Any],
    table: Mapping[str, tuple[str, tuple[Any, ...]]],
    expected: frozenset[str],
    cfg: Any,
    kind: str,
    source: str,
    prefix: str = "",
) -> None:
    for key, value in rest.items():
        if key not in table:
            continue
        effect, values = table[key]
        items = (item(cfg) if callable(item) else item for item in values)
        neutral = [item for item in items if item is not None]
        if not _is_neutral(value, neutral):
            allowed = " or ".join([*(repr(item) for item in neutral), "absent"])
            raise ValueError(
                f"{source}: expected {allowed} for {prefix}{key}, got {value!r}; the key {effect}, "
                f"which is not implemented for {kind}"
            )
    unknown = sorted(str(key) for key in rest.keys() - table.keys() - expected)
    log_ignored_keys(source, tuple(prefix + key for key in unknown))


def _is_neutral(value: Any, neutral: list[Any]) -> bool:
    if value is None or any(_same(value, item) for item in neutral):
        return True
    return isinstance(value, list) and all(_is_neutral(item, neutral) for item in value)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-6)  # the value may be a rounded float32
    return value == other


_QUANTIZATION = ("quantization_config", "compression_config")
_QUANTIZED_ADVICE = (
    "weights quantized in this format cannot be read; use unquantized safetensors or a GGUF file "
    "(if the weights have been dequantized, remove the key)"
)


def _is_disabled(value: Any) -> bool:
    """Return whether a `quantization_config` of bitsandbytes has both quantizations disabled."""
    return (
        isinstance(value, Mapping)
        and value.get("quant_method") == "bitsandbytes"
        and value.get("load_in_4bit") is value.get("load_in_8bit") is False
    )


def _method(value: Any) -> str:
    """Return the name of the quantization method of a `quantization_config`."""
    if not isinstance(value, Mapping):
        return repr(value)
    method = str(value.get("quant_method") or "of an unnamed method")
    if layout := value.get("format"):
        method += f" {layout}"
    bits = next((n for n in (4, 8) if value.get(f"load_in_{n}bit")), value.get("bits"))
    return f"{method} ({bits} bit)" if bits else method
