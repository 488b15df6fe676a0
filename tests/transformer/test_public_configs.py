"""Tests of configs like those of public models: they are read correctly or rejected.

Public files have keys of many versions of transformers, of trainers and of their authors. Keys
without effect must be ignored, and keys that change the forward pass must be rejected.
"""

import json
import logging

import pytest

import audio.config
from tests.naming import naming
from tests.transformer.conftest import MORE, TINY
from tests.transformer.test_config import hf
from transformer import config_keys, encoder, families, gguf_config, hf_config
from transformer.config import RopeScaling

LLAMA = dict(
    attention_bias=False, bos_token_id=1, eos_token_id=2, hidden_act="silu", initializer_range=0.02,
    model_type="llama", pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=None, use_cache=True,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.40.0",
)  # fmt: skip
QWEN = LLAMA | dict(
    attention_dropout=0.0, rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False
)
del QWEN["attention_bias"], QWEN["pretraining_tp"], QWEN["rope_scaling"]
MISTRAL = {key: value for key, value in QWEN.items() if key != "use_sliding_window"}
MISTRAL["model_type"] = "mistral"
GEMMA = dict(
    attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None, bos_token_id=2,
    cache_implementation="hybrid", eos_token_id=[1, 106], final_logit_softcapping=None,
    head_dim=256, hidden_activation="gelu_pytorch_tanh", initializer_range=0.02,
    max_position_embeddings=32768, model_type="gemma3_text", num_attention_heads=4,
    num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
    rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512,
    use_cache=True, vocab_size=262144,
)  # fmt: skip


def sized(base, width, inner, layers, heads, kv_heads, vocab, context, **more) -> dict:
    return base | dict(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context,
    ) | more  # fmt: skip


# Published config.json files, and the number of weights of their models.
PUBLISHED = {
    "gpt2": (
        dict(
            activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1,
            bos_token_id=50256, embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02,
            layer_norm_epsilon=1e-5, model_type="gpt2", n_ctx=1024, n_embd=768, n_head=12,
            n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None,
            summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
            summary_use_proj=True, vocab_size=50257,
            task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
        124_439_808,
    ),
    "Llama-2-7b": (sized(LLAMA, 4096, 11008, 32, 32, 32, 32000, 4096), 6_738_415_616),
    "Llama-3.2-1B": (
        sized(
            LLAMA, 2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, mlp_bias=False,
            rope_theta=5e5, tie_word_embeddings=True, rope_scaling=dict(
                factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, rope_type="llama3",
                original_max_position_embeddings=8192,
            ),
        ),
        1_235_814_400,
    ),
    "TinyLlama-1.1B": (sized(LLAMA, 2048, 5632, 22, 32, 4, 32000, 2048), 1_100_048_384),
    "SmolLM2-135M": (
        sized(
            LLAMA, 576, 1536, 30, 9, 3, 49152, 8192, is_llama_config=True, rope_interleaved=False,
            rope_theta=100000, tie_word_embeddings=True,
        ),
        134_515_008,
    ),
    "Mistral-7B-v0.1": (
        sized(
            MISTRAL, 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096,
        ),
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        sized(
            QWEN, 896, 4864, 24, 14, 2, 151936, 32768, model_type="qwen2", sliding_window=32768,
            max_window_layers=24, use_mrope=False, tie_word_embeddings=True,
        ),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        sized(
            QWEN, 1024, 3072, 28, 16, 8, 151936, 40960, model_type="qwen3", sliding_window=None,
            max_window_layers=28, attention_bias=False, head_dim=128, rope_scaling=None,
            tie_word_embeddings=True,
        ),
        596_049_920,
    ),
    "gemma-3-1b": (
        GEMMA
        | dict(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26)
        | dict(sliding_window_pattern=6),
        999_885_952,
    ),
    "gemma-3-270m": (
        GEMMA
        | dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18)
        | dict(_sliding_window_pattern=6, use_bidirectional_attention=False)
        | dict(layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3),
        268_098_176,
    ),
}  # fmt: skip


GEMMA2 = GEMMA | dict(
    attn_logit_softcapping=50.0, final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh",
    max_position_embeddings=8192, model_type="gemma2", rope_theta=10000.0, sliding_window=4096,
    sliding_window_size=4096, vocab_size=256000,
)  # fmt: skip
del GEMMA2["rope_local_base_freq"], GEMMA2["rope_scaling"], GEMMA2["sliding_window_size"]
GEMMA1 = dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=2, eos_token_id=1, head_dim=256,
    hidden_act="gelu", hidden_activation=None, initializer_range=0.02, model_type="gemma",
    pad_token_id=0, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000.0, use_cache=True,
)  # fmt: skip
PHI3 = dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=1, embd_pdrop=0.0, eos_token_id=32000,
    hidden_act="silu", initializer_range=0.02, model_type="phi3", rms_norm_eps=1e-5,
    original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0, rope_scaling=None,
    rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
PHI3_LONG = dict(type="longrope", short_factor=[1.0] * 48, long_factor=[1.0] * 24 + [64.0] * 24)
NEOX = dict(
    bos_token_id=0, eos_token_id=0, hidden_act="gelu", initializer_range=0.02, layer_norm_eps=1e-5,
    max_position_embeddings=2048, model_type="gpt_neox", rotary_emb_base=10000, rotary_pct=0.25,
    tie_word_embeddings=False, torch_dtype="float16", use_cache=True, use_parallel_residual=True,
)  # fmt: skip
GRANITE = dict(
    attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0,
    residual_multiplier=0.22,
)  # fmt: skip
OLMO2 = LLAMA | dict(model_type="olmo2", rms_norm_eps=1e-6, rope_theta=500000)
MOE = dict(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, head_dim=128)
MOE |= dict(output_router_logits=False, router_aux_loss_coef=0.001, moe_intermediate_size=768)


def neox(width, layers, heads, vocab, **more) -> dict:
    return NEOX | dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads,
    ) | more  # fmt: skip


# Other families: config.json, number of weights, and the fields that tell it from a Llama.
PUBLISHED_MORE = {
    "gemma-2b": (
        sized(GEMMA1, 2048, 16384, 18, 8, 1, 256000, 8192),
        2_506_172_416,
        dict(norm="unit_rms", mlp="geglu", scale_embeddings=True, post_norms=False,
             tie_embeddings=True, query_scalar=None),
    ),
    "codegemma-7b-it": (
        sized(GEMMA1, 3072, 24576, 28, 16, 16, 256000, 8192, hidden_activation="gelu_pytorch_tanh"),
        8_537_680_896,
        dict(head_dim=256, num_kv_heads=16, mlp="geglu"),
    ),
    "gemma-2-2b": (
        GEMMA2 | dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26)
        | dict(num_attention_heads=8, num_key_value_heads=4),
        2_614_341_888,
        dict(windows=(4096, None), attn_logit_softcap=50.0, final_logit_softcap=30.0,
             query_scalar=None),
    ),
    "gemma-2-27b": (
        GEMMA2 | dict(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, head_dim=128)
        | dict(num_attention_heads=32, num_key_value_heads=16, query_pre_attn_scalar=144),
        27_227_128_320,
        dict(query_scalar=144),
    ),
    "Phi-3-mini-4k": (
        sized(PHI3, 3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047),
        3_821_079_552,
        dict(windows=(2047,), rotary_dim=None, rope_scaling=None),
    ),
    "Phi-3-mini-128k": (
        sized(PHI3, 3072, 8192, 32, 32, 32, 32064, 131072, sliding_window=262144)
        | dict(rope_scaling=PHI3_LONG),
        3_821_079_552,
        dict(
            windows=(262144,),
            rope_scaling=RopeScaling(
                rope_type="longrope", original_max_seq_len=4096, short_factor=(1.0,) * 48,
                long_factor=(1.0,) * 24 + (64.0,) * 24, attention_factor=1.1902380714238083,
            ),
        ),
    ),
    "Phi-4-mini": (
        sized(PHI3, 3072, 8192, 32, 24, 8, 200064, 131072, sliding_window=262144)
        | dict(
            rope_scaling=dict(PHI3_LONG, short_factor=[1.0] * 48), partial_rotary_factor=0.75,
            tie_word_embeddings=True, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
        ),
        3_836_021_760,
        dict(rotary_dim=96, tie_embeddings=True),
    ),
    "phi-4": (
        sized(PHI3, 5120, 17920, 40, 40, 10, 100352, 16384, sliding_window=None, rope_theta=250000)
        | dict(original_max_position_embeddings=16384),
        14_659_507_200,
        dict(windows=(None,), rope_theta=250000, rope_scaling=None),
    ),
    "pythia-70m": (
        neox(512, 6, 8, 50304),
        70_426_624,
        dict(rotary_dim=16, parallel_residual=True, mlp="gelu_erf", rope_theta=10000),
    ),
    "gpt-neox-20b": (
        neox(6144, 44, 64, 50432, hidden_act="gelu_fast", attention_probs_dropout_prob=0),
        20_554_567_680,
        dict(rotary_dim=24, mlp="gelu"),
    ),
    "RedPajama-INCITE-3B": (
        neox(2560, 32, 32, 50432, use_parallel_residual=False, rotary_pct=1.0),
        2_775_864_320,
        dict(rotary_dim=None, parallel_residual=False),
    ),
    "OLMo-2-0425-1B": (
        sized(OLMO2, 2048, 8192, 16, 16, 16, 100352, 4096),
        1_484_916_736,
        dict(qk_norm_over="projection", pre_norms=False, post_norms=True),
    ),
    "granite-3.1-2b": (
        sized(LLAMA, 2048, 8192, 40, 32, 8, 49155, 131072, model_type="granite", mlp_bias=False)
        | GRANITE | dict(tie_word_embeddings=True, rope_theta=5e6, attention_dropout=0.1),
        2_533_531_648,
        dict(attention_multiplier=0.015625, embedding_multiplier=12.0, logits_scaling=8.0,
             residual_multiplier=0.22),
    ),
    "SmolLM3-3B": (
        sized(LLAMA, 2048, 11008, 36, 16, 4, 128256, 65536, model_type="smollm3", mlp_bias=False)
        | dict(
            no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, rope_theta=5e6,
            layer_types=["full_attention"] * 36, max_window_layers=28, use_sliding_window=False,
            sliding_window=None, tie_word_embeddings=True, rms_norm_eps=1e-6,
        ),
        3_075_098_624,
        dict(rope_layers=(True, True, True, False), windows=(None,)),
    ),
    "Qwen3-30B-A3B": (
        sized(QWEN, 2048, 6144, 48, 32, 4, 151936, 40960, model_type="qwen3_moe", num_experts=128)
        | MOE | dict(attention_bias=False, num_experts_per_tok=8, max_window_layers=48)
        | dict(sliding_window=None),
        30_532_122_624,
        dict(num_experts=128, num_experts_per_tok=8, d_ff=768, norm_topk_prob=True, qk_norm=True),
    ),
    "Mixtral-8x7B": (
        sized(MISTRAL, 4096, 14336, 32, 32, 8, 32000, 32768, model_type="mixtral")
        | dict(num_local_experts=8, num_experts_per_tok=2, output_router_logits=False)
        | dict(router_aux_loss_coef=0.02, sliding_window=None, rms_norm_eps=1e-5),
        46_702_792_704,
        dict(num_experts=8, num_experts_per_tok=2, d_ff=14336, norm_topk_prob=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_MORE)
def test_published_config_sets_fields_and_num_params(name, caplog):
    config, num_params, fields = PUBLISHED_MORE[name]
    cfg = hf_config.from_hf(config)
    assert {field: getattr(cfg, field) for field in fields} == fields
    assert cfg.num_params == num_params
    restored = json.loads(json.dumps(hf_config.to_hf(cfg)))
    assert restored["model_type"] == config["model_type"]
    assert hf_config.from_hf(restored) == cfg


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_sets_windows_and_num_params(name):
    config, num_params = PUBLISHED[name]
    cfg = hf_config.from_hf(config)
    assert cfg.num_params == num_params
    assert hf_config.from_hf(json.loads(json.dumps(hf_config.to_hf(cfg)))) == cfg
    expected = {"gemma-3-1b": (512,) * 5 + (None,), "gemma-3-270m": (512,) * 5 + (None,)}
    expected["Mistral-7B-v0.1"] = (4096,)
    assert cfg.windows == expected.get(name, (None,))
    assert cfg.query_scalar is None


def changed(name: str, **changes) -> dict:
    """Return a published config with keys replaced; `...` removes a key."""
    config = PUBLISHED[name][0] | changes
    return {key: value for key, value in config.items() if value is not ...}


GPT2_SMALL = PUBLISHED["gpt2"][0]
TINYLLAMA, LLAMA32 = "TinyLlama-1.1B", "Llama-3.2-1B"
YARN = dict(type="yarn", factor=16.0, original_max_position_embeddings=4096, finetuned=True)
BNB = dict(
    _load_in_4bit=True, _load_in_8bit=False, bnb_4bit_compute_dtype="bfloat16",
    bnb_4bit_quant_type="nf4", load_in_4bit=True, load_in_8bit=False, quant_method="bitsandbytes",
)  # fmt: skip
GPTQ = dict(bits=4, group_size=128, desc_act=False, quant_method="gptq", sym=True)
AWQ = dict(bits=4, group_size=128, quant_method="awq", version="gemm", zero_point=True)
FP8 = dict(quant_method="compressed-tensors", format="float-quantized", config_groups={})
# Name -> config.json, and a field of the Config with its value.
ACCEPTED = {
    "a Mistral without groups of heads": (
        changed("Mistral-7B-v0.1", num_key_value_heads=None),
        "num_kv_heads",
        32,
    ),
    "a factor of 1": (changed(TINYLLAMA, rope_scaling={"factor": 1.0}), "rope_scaling", None),
    "distilgpt2": (GPT2_SMALL | dict(_num_labels=1, n_layer=6), "num_layers", 6),
    "gpt2-medium": (
        GPT2_SMALL
        | dict(n_embd=1024, n_head=16, n_layer=24, n_special=0, predict_special_tokens=True),
        "num_params",
        354_823_168,
    ),
    "gpt2-xl": (
        GPT2_SMALL | dict(n_embd=1600, n_head=25, n_layer=48, output_past=True),
        "head_dim",
        64,
    ),
    "DialoGPT-small": (
        GPT2_SMALL | dict(task_specific_params={"conversational": {"max_length": 1000}}),
        "d_ff",
        3072,
    ),
    "gpt2-chinese-cluecorpussmall": (
        GPT2_SMALL
        | dict(vocab_size=21128, gradient_checkpointing=False, tokenizer_class="BertTokenizer"),
        "vocab_size",
        21128,
    ),
    "gpt2 fine-tuned with upcast attention": (
        GPT2_SMALL | dict(reorder_and_upcast_attn=True, n_inner=None, scale_attn_weights=True),
        "d_ff",
        3072,
    ),
    "gpt2 with another name of its activation": (
        GPT2_SMALL | dict(activation_function="gelu_pytorch_tanh"),
        "mlp",
        "gelu",
    ),
    "vicuna-7b": (
        changed(
            "Llama-2-7b",
            _name_or_path="vicuna-7b-v1.5",
            max_sequence_length=4096,
            pad_token_id=0,
            temperature=0.9,
            top_p=0.6,
        ),
        "num_layers",
        32,
    ),
    "CodeLlama-7b": (
        changed(
            "Llama-2-7b",
            rope_theta=1_000_000,
            vocab_size=32016,
            max_position_embeddings=16384,
            auto_map={},
        ),
        "rope_theta",
        1_000_000,
    ),
    "Yarn-Llama-2-7b-64k": (
        changed(
            "Llama-2-7b",
            rope_scaling=YARN,
            max_position_embeddings=65536,
            use_flash_attention=False,
        ),
        "rope_scaling",
        RopeScaling(
            rope_type="yarn",
            factor=16.0,
            original_max_seq_len=4096,
            beta_fast=32.0,
            beta_slow=1.0,
            attention_factor=hf_config.yarn_mscale(16.0),
        ),
    ),
    "Llama-3.1-8B": (
        changed(
            LLAMA32,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            head_dim=...,
            tie_word_embeddings=False,
            rope_scaling=dict(PUBLISHED[LLAMA32][0]["rope_scaling"], factor=8.0),
            eos_token_id=[128001, 128008, 128009],
        ),
        "num_params",
        8_030_261_248,
    ),
    "unsloth/Llama-3.2-1B": (
        changed(LLAMA32, unsloth_fixed=True, unsloth_version="2024.9", pad_token_id=128004),
        "max_seq_len",
        131072,
    ),
    "Llama-3.2-1B saved after training with torch": (
        changed(
            LLAMA32, _attn_implementation_autoset=True, use_cache=False, gradient_checkpointing=True
        ),
        "tie_embeddings",
        True,
    ),
    "Llama 3.2 as transformers 5 writes it": (
        changed(
            LLAMA32,
            rope_theta=...,
            rope_scaling=...,
            dtype="bfloat16",
            torch_dtype=...,
            rope_parameters=dict(PUBLISHED[LLAMA32][0]["rope_scaling"], rope_theta=5e5),
        ),
        "rope_theta",
        5e5,
    ),
    "TinyLlama merged by PEFT": (
        changed(TINYLLAMA, _name_or_path="./merged", quantization_config=None, rope_scaling={}),
        "rope_scaling",
        None,
    ),
    "TinyLlama exported by axolotl": (
        changed(
            TINYLLAMA,
            use_cache=False,
            rope_theta=10000.0,
            axolotl_config_path="x.yml",
            quantization_config={},
            _commit_hash="x",
        ),
        "num_kv_heads",
        4,
    ),
    "Qwen2.5 rewritten as a Llama": (
        changed(
            TINYLLAMA,
            use_sliding_window=False,
            sliding_window=131072,
            max_window_layers=22,
            layer_types=["full_attention"] * 22,
        ),
        "windows",
        (None,),
    ),
    "SmolLM-135M": (
        changed(
            "SmolLM2-135M",
            rope_theta=10000.0,
            max_position_embeddings=2048,
            rope_interleaved=...,
            is_llama_config=...,
        ),
        "max_seq_len",
        2048,
    ),
    "SmolLM2-135M-Instruct": (
        changed("SmolLM2-135M", **{"transformers.js_config": {"dtype": "q4"}}),
        "num_heads",
        9,
    ),
    "Mistral-7B-v0.3": (
        changed("Mistral-7B-v0.1", sliding_window=None, vocab_size=32768, rope_theta=1e6),
        "windows",
        (None,),
    ),
    "Mistral-Nemo": (
        changed(
            "Mistral-7B-v0.1",
            sliding_window=None,
            head_dim=128,
            hidden_size=5120,
            num_hidden_layers=40,
            max_position_embeddings=131072,
            attention_dropout=0.0,
        ),
        "head_dim",
        128,
    ),
    "Qwen2-0.5B": (changed("Qwen2.5-0.5B", use_mrope=..., sliding_window=131072), "qkv_bias", True),
    "Qwen2.5 extended with YaRN": (
        changed(
            "Qwen2.5-0.5B",
            rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn"),
        ),
        "rope_scaling",
        RopeScaling(
            rope_type="yarn",
            factor=4.0,
            original_max_seq_len=32768,
            beta_fast=32.0,
            beta_slow=1.0,
            attention_factor=hf_config.yarn_mscale(4.0),
        ),
    ),
    "Qwen3-0.6B-Base": (
        changed(
            "Qwen3-0.6B",
            max_position_embeddings=32768,
            use_sliding_window=False,
            sliding_window=None,
        ),
        "qk_norm",
        True,
    ),
    "gemma-3-270m-it by unsloth": (
        changed(
            "gemma-3-270m", unsloth_fixed=True, torch_dtype="bfloat16", _sliding_window_pattern=6
        ),
        "query_scalar",
        None,
    ),
    "a MoE key that says there are none": (
        changed(TINYLLAMA, num_local_experts=0, num_experts_per_tok=None, n_routed_experts=None),
        "mlp",
        "swiglu",
    ),
    "neutral multipliers": (
        changed(
            TINYLLAMA,
            attention_multiplier=0.125,
            embedding_multiplier=1.0,
            residual_multiplier=1,
            logits_scaling=1.0,
            mlp_bias=False,
            partial_rotary_factor=1.0,
        ),
        "head_dim",
        64,
    ),
    "SmolLM3's keys where each layer has positions": (
        changed(TINYLLAMA, no_rope_layers=[1] * 22, layer_types=["full_attention"] * 22),
        "num_layers",
        22,
    ),
}

# Name -> config.json, and the key that the message must name, with what else it must say.
REFUSED = {
    "Granite written as a Llama": (changed(TINYLLAMA, **GRANITE), "attention_multiplier"),
    "Granite's residual multiplier alone": (
        changed(TINYLLAMA, residual_multiplier=0.22),
        "residual_multiplier",
        "0.22",
    ),
    "Phi written as a Llama": (
        changed(TINYLLAMA, partial_rotary_factor=0.4),
        "partial_rotary_factor",
        "0.4",
    ),
    "Mixtral written as a Mistral": (
        changed("Mistral-7B-v0.1", num_local_experts=8, num_experts_per_tok=2),
        "num_local_experts",
        "8",
    ),
    "Qwen3 MoE written as a Qwen3": (changed("Qwen3-0.6B", num_experts=128), "num_experts", "128"),
    "Gemma 2's caps written as a Qwen3": (
        changed("Qwen3-0.6B", attn_logit_softcapping=50.0),
        "attn_logit_softcapping",
        "50.0",
    ),
    "SmolLM3's layers without positions": (
        changed(TINYLLAMA, no_rope_layers=[1, 1, 1, 0] * 5 + [1, 1]),
        "no_rope_layers",
    ),
    "a Llama with a window": (changed(TINYLLAMA, sliding_window=512), "sliding_window", "512"),
    "a Llama with biases": (changed(TINYLLAMA, attention_bias=True), "attention_bias", "True"),
    "Llama 4's chunks": (changed(TINYLLAMA, attention_chunk_size=8192), "attention_chunk_size"),
    "OLMo's clipping": (changed(TINYLLAMA, clip_qkv=8.0), "clip_qkv", "8.0"),
    "MiniCPM's scales": (changed(TINYLLAMA, scale_emb=12), "scale_emb", "12"),
    "a GPT-2 with scaled layers (stanford-crfm)": (
        GPT2_SMALL | dict(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
    "a GPT-2 with ReLU": (
        GPT2_SMALL | dict(activation_function="relu"),
        "activation_function",
    ),
    "a GPT-2 with ALiBi": (
        GPT2_SMALL | dict(position_embedding_type="alibi"),
        "position_embedding_type",
        "'alibi'",
    ),
    "LongRoPE of another head size": (
        changed(
            TINYLLAMA, rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[2.0])
        ),
        "longrope",
        "short_factor",
    ),
    "dynamic NTK": (changed(TINYLLAMA, rope_scaling=dict(type="dynamic", factor=2.0)), "'dynamic'"),
    "embedding model (LLM2Vec)": (
        changed("Mistral-7B-v0.1", use_bidirectional_attention=True),
        "use_bidirectional_attention",
    ),
    "bitsandbytes": (
        changed(TINYLLAMA, quantization_config=BNB),
        "quantization_config",
        "bitsandbytes",
    ),
    "GPTQ": (changed(LLAMA32, quantization_config=GPTQ), "quantization_config", "gptq"),
    "AWQ": (
        changed("Qwen2.5-0.5B", quantization_config=AWQ),
        "quantization_config",
        "awq",
    ),
    "FP8": (
        changed("Qwen3-0.6B", quantization_config=FP8),
        "quantization_config",
        "compressed-tensors",
    ),
    "quantised by an old tool": (changed(TINYLLAMA, compression_config=FP8), "compression_config"),
    "Falcon": (dict(model_type="falcon"), "model_type"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_key_of_public_config_sets_field(name):
    config, field, value = ACCEPTED[name]
    assert getattr(hf_config.from_hf(config), field) == value


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_public_config_is_rejected_with_key(name):
    config, *facts = REFUSED[name]
    with pytest.raises(ValueError, match=naming(*facts)):
        hf_config.from_hf(config)


NEUTRAL = {
    "no window": dict(sliding_window=0),
    "no window in old files": dict(sliding_window=-1),
    "flash attention without a window": dict(window_size=[-1, -1]),
    "MPT without clipping": dict(clip_qkv=0),
    "no vision": dict(vision_config={}, audio_config={}, text_config={}),
    "no options of MPT": dict(attn_config={}, ffn_config={}),
    "activation in the key of Nemotron": dict(mlp_hidden_act="silu"),
    "rotation in every layer, with an unused interval": dict(
        no_rope_layers=[1, 1], no_rope_layer_interval=4
    ),
    "no scaling": dict(rope_scaling=False),
    "dynamic NTK by 1": dict(rope_scaling=dict(type="dynamic", factor=1.0)),
    "bitsandbytes, switched off": dict(
        quantization_config=BNB | dict(load_in_4bit=False, load_in_8bit=False)
    ),
    "Llama 4's tuning, switched off": dict(attn_temperature_tuning=False, attn_scale=0.1),
}
NOT_NEUTRAL = {
    "sliding_window": dict(sliding_window=1),
    "output_multiplier": dict(output_multiplier=0.5),
    "qk_scale_factor": dict(qk_scale_factor=2.0),
    "no_rope_layer_interval": dict(no_rope_layer_interval=4),
    "window_size": dict(window_size=[-1, 0]),
    "clip_qkv": dict(clip_qkv=0.5),
    "vision_config": dict(vision_config={"hidden_size": 8}),
    "attn_config": dict(attn_config={"alibi": True}),
    "mlp_hidden_act": dict(mlp_hidden_act="relu2"),
    "rope_scaling": dict(rope_scaling=True),
    "rope_type": dict(rope_scaling=dict(type="dynamic", factor=1.5)),
    "quantization_config": dict(quantization_config=dict(quant_method="bitsandbytes")),
    "attn_scale": dict(attn_scale=0.1),
    "attn_temperature_tuning": dict(attn_temperature_tuning=True),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_value_does_not_change_config(name):
    """Bug: these keys were rejected, although they do not change a Llama."""
    assert hf_config.from_hf(changed(TINYLLAMA, **NEUTRAL[name])) == hf_config.from_hf(
        changed(TINYLLAMA)
    )


@pytest.mark.parametrize("key", NOT_NEUTRAL)
def test_value_that_is_not_neutral_is_rejected(key):
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        hf_config.from_hf(changed(TINYLLAMA, **NOT_NEUTRAL[key]))


# model_type -> the reader of its config.json, and a valid config.json.
OTHERS = {
    "bert": (encoder.Config.from_hf, encoder.Config.debug().to_hf()),
    "whisper": (audio.config.Config.from_hf, audio.config.Config.debug().to_hf()),
}


@pytest.mark.parametrize("key", config_keys.CONFIG)
def test_every_table_key_with_other_value_is_rejected(key):
    """Every family that does not use the key rejects an invalid value with the key's name."""
    for name in (*TINY, *MORE):
        family = families.FAMILIES[hf(name)["model_type"]]
        own = {
            *family.keys,
            *family.hf_defaults,
            family.activation[0],
            "layer_types",
            "rope_scaling",
        }
        if family.has_rope_layers:
            own |= {"no_rope_layers", "no_rope_layer_interval"}
        if family.rotary_key:
            own |= {"partial_rotary_factor"}
        if "num_experts_per_tok" in family.keys:
            own |= {"num_experts", "num_local_experts"}
        if key in own | {"rope_parameters"}:
            continue
        with pytest.raises(ValueError, match=naming(key, "'x'")):
            hf_config.from_hf(hf(name, **{key: "x"}))
        neutral = hf_config.from_hf(hf(name, **{key: None}))
        assert neutral == hf_config.from_hf(hf(name))


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("key", config_keys.CONFIG)
def test_every_table_key_is_rejected_for_bert_and_whisper(kind, key):
    """Bug: `scale_depth` in the config of a Whisper raised AttributeError."""
    from_hf, config = OTHERS[kind]
    for value in ("x", 7, [7], {"x": 7}):
        with pytest.raises(ValueError, match=rf"\b{key}\b"):
            from_hf(config | {key: value})


def test_ignored_keys_are_logged_once(caplog):
    config_keys._log_ignored_keys_once.cache_clear()
    config = hf("llama", frobnicate=1, unsloth_fixed=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert hf_config.from_hf(config) == hf_config.from_hf(hf("llama"))
    (record,) = caplog.records
    assert "'frobnicate', 'unsloth_fixed'" in record.getMessage()


# GGUF

LLAMA_GGUF = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "Llama 3.2 1B Instruct",
    "general.file_type": 15,
    "general.quantization_version": 2,
    "general.base_model.count": 1,
    "general.languages": ["en"],
    "llama.block_count": 16,
    "llama.context_length": 131072,
    "llama.embedding_length": 2048,
    "llama.feed_forward_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.attention.key_length": 64,
    "llama.attention.value_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 64,
    "llama.vocab_size": 128256,
}
GGUF_NEUTRAL = {
    "experts of old converters": {"llama.expert_count": 0, "llama.expert_used_count": 0},
    "rope.scaling of old converters": {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.rope.scaling.finetuned": False,
        "llama.rope.scale_linear": 1.0,
    },
    "a factor of 0": {"llama.rope.scaling.factor": 0.0},
    "neutral numbers": {
        "llama.attention.causal": True,
        "llama.logit_scale": 1.0,
        "llama.residual_scale": 1.0,
        "llama.embedding_scale": 1.0,
        "llama.attention.scale": 0.125,
        "llama.attention.clamp_kqv": 0.0,
        "llama.attention.max_alibi_bias": 0.0,
        "llama.use_parallel_residual": False,
        "llama.attn_logit_softcapping": 0.0,
    },
    "a window as long as the context": {"llama.attention.sliding_window": 131072},
    "layout of Meta's files": {"llama.tensor_data_layout": "Meta AI original pth"},
    "keys of an importance matrix": {
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.entries_count": 112,
    },
    "split keys of a single file": {"split.no": 0, "split.count": 1, "split.tensors.count": 147},
    "unknown": {"llama.frobnicate": 1, "mradermacher.quantized_by": "x", "general.url": "x"},
}
GGUF_REFUSED = {
    "llama.expert_count": -1,
    "llama.rope.scaling.attn_factor": 1.19,
    "llama.attention.causal": False,
    "llama.logit_scale": 0.0625,
    "llama.residual_scale": 0.22,
    "llama.embedding_scale": 12.0,
    "llama.attention.scale": 0.015625,
    "llama.attn_logit_softcapping": 50.0,
    "llama.final_logit_softcapping": 30.0,
    "llama.attention.clamp_kqv": 8.0,
    "llama.attention.max_alibi_bias": 8.0,
    "llama.attention.sliding_window": 4096,
    "llama.use_parallel_residual": True,
    "llama.rope.dimension_count": 32,
    "split.count": 2,
    "general.type": "adapter",
}


@pytest.mark.parametrize("name", GGUF_NEUTRAL)
def test_neutral_gguf_keys_do_not_change_config(name):
    expected = gguf_config.from_gguf(LLAMA_GGUF, has_head=False)
    assert gguf_config.from_gguf(LLAMA_GGUF | GGUF_NEUTRAL[name], has_head=False) == expected
    assert expected.num_params == 1_235_814_400


@pytest.mark.parametrize("key", GGUF_REFUSED)
def test_unsupported_gguf_key_is_rejected_with_name(key):
    with pytest.raises(ValueError, match=key):
        gguf_config.from_gguf(LLAMA_GGUF | {key: GGUF_REFUSED[key]}, has_head=False)


@pytest.mark.parametrize("key", config_keys.GGUF)
def test_every_gguf_table_key_with_other_value_is_rejected(key):
    with pytest.raises(ValueError, match=naming(f"llama.{key}", "'x'")):
        gguf_config.from_gguf(LLAMA_GGUF | {f"llama.{key}": "x"}, has_head=False)


def test_gguf_rope_scaling_matches_llama_cpp():
    """The default type is linear; YaRN's original length defaults to the context length."""

    def scaling(**keys) -> RopeScaling | None:
        keys = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
        return gguf_config.from_gguf(LLAMA_GGUF | keys, has_head=False).rope_scaling

    assert scaling(factor=4.0) == RopeScaling(rope_type="linear", factor=4.0)
    assert scaling(type="linear") is None and scaling(type="none", factor=4.0) is None
    yarn = dict(type="yarn", factor=4.0, finetuned=True)
    expected = dict(rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0)
    sharp = hf_config.yarn_mscale(4.0)
    assert scaling(**yarn) == RopeScaling(
        **expected, original_max_seq_len=131072, attention_factor=sharp
    )
    assert scaling(
        **yarn, attn_factor=0.5, original_context_length=4096, yarn_attn_factor=sharp
    ) == RopeScaling(**expected, original_max_seq_len=4096, attention_factor=sharp / 2)
    with pytest.raises(ValueError, match="yarn_attn_factor"):
        scaling(**yarn, yarn_attn_factor=1.5)
