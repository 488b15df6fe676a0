"""Tests of Config: validation, and conversion from and to a Hugging Face config.json."""

import contextlib
import dataclasses
import json

import pytest

from tests.naming import naming
from tests.transformer.conftest import (
    GEMMA_VARIANT,
    GOLDEN,
    GPT2_VARIANT,
    INVALID_VALUES,
    MORE,
    TINY,
)
from transformer import hf_config
from transformer.config import Config, RopeScaling

LINEAR = RopeScaling(rope_type="linear", factor=8.0)
LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    original_max_seq_len=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
LONGROPE = RopeScaling(
    rope_type="longrope",
    original_max_seq_len=64,
    attention_factor=1.2,
    short_factor=(1.0, 1.0, 1.5, 2.0),
    long_factor=(1.0, 2.0, 4.0, 8.0),
)
YARN = RopeScaling(
    rope_type="yarn",
    factor=4.0,
    original_max_seq_len=512,
    beta_fast=32.0,
    beta_slow=1.0,
    attention_factor=1.1,
)


GPT_OSS = Config.debug(
    qkv_bias=True,
    linear_bias=True,
    attention_sinks=True,
    mlp="swiglu_oai",
    swiglu_limit=7.0,
    num_experts=4,
    num_experts_per_tok=2,
    windows=(64, None),
)
LONG = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 2.5, 9.0]
)


def hf(name: str, **changes) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def test_debug_config_is_small_and_hashable():
    assert Config.debug().num_params < 50_000
    assert hash(Config.debug()) == hash(Config.debug())
    assert Config.debug(d_ff=56) != Config.debug()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"num_layers": 0}, ["num_layers", 0]),
        ({"d_model": 32.0}, ["d_model", 32.0]),
        ({"vocab_size": True}, ["vocab_size", True]),
        ({"num_kv_heads": 3}, ["num_heads", "num_kv_heads", 4, 3]),
        ({"head_dim": 7}, ["head_dim", 7]),
        ({"norm": "batch"}, ["norm", "'batch'"]),
        ({"mlp": None}, ["mlp", None]),
        ({"norm_eps": 0.0}, ["norm_eps", 0.0]),
        ({"rope_theta": float("nan")}, ["rope_theta", "nan"]),
        ({"rope_theta": "10000"}, ["rope_theta", "'10000'"]),
        ({"tie_embeddings": 1}, ["tie_embeddings", 1]),
        ({"num_layers": 5000}, ["num_layers", 4096, 5000]),
        ({"windows": ()}, ["windows", "()"]),
        ({"windows": (0,)}, ["windows", 0]),
        ({"query_scalar": 2.5}, ["query_scalar", 2.5]),
        ({"local_rope_theta": 0}, ["local_rope_theta", 0]),
        ({"norm": "layer", "qk_norm": True}, ["qk_norm", "norm='layer'"]),
        ({"qk_norm_over": "projection"}, ["qk_norm_over", "qk_norm"]),
        ({"pre_norms": False}, ["pre_norms", "post_norms"]),
        ({"parallel_residual": True, "post_norms": True}, ["parallel_residual", "post_norms"]),
        ({"rotary_dim": 3}, ["rotary_dim", 8, 3]),
        ({"rotary_dim": 10}, ["rotary_dim", 8, 10]),
        ({"rope_layers": (1, 0)}, ["rope_layers", "(1, 0)"]),
        ({"rope_layers": (False,), "position": "learned"}, ["rope_layers", "position"]),
        ({"attn_logit_softcap": 0.0}, ["attn_logit_softcap", 0.0]),
        ({"query_scalar": 4, "attention_multiplier": 0.5}, ["query_scalar", 4, 0.5]),
        ({"num_experts": 4}, ["num_experts", "num_experts_per_tok", 4, None]),
        ({"num_experts": 4, "num_experts_per_tok": 5}, ["num_experts_per_tok", 4, 5]),
        ({"num_experts": 2, "num_experts_per_tok": 1, "mlp": "gelu"}, ["mlp", "'gelu'"]),
        ({"swiglu_limit": 7.0}, ["swiglu_limit", 7.0, "'swiglu'"]),
        ({"mlp": "swiglu_oai"}, ["swiglu_limit", None, "'swiglu_oai'"]),
        ({"mlp": "swiglu_oai", "swiglu_limit": 0.0}, ["swiglu_limit", 0.0]),
        ({"attention_sinks": 1}, ["attention_sinks", 1]),
    ],
    ids=str,
)
def test_invalid_field_is_rejected(change, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        Config.debug(**change)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"rope_type": "ntk"}, ["rope_type", "linear", "llama3", "yarn", "'ntk'"]),
        ({"factor": 0.0}, ["llama3", "factor", 0.0]),
        ({"low_freq_factor": None}, ["llama3", "low_freq_factor", None]),
        ({"beta_fast": 3.0}, ["llama3", "beta_fast", 3.0]),
        ({"low_freq_factor": 4.0}, ["low_freq_factor", "high_freq_factor"]),
    ],
    ids=str,
)
def test_invalid_rope_scaling_is_rejected(change, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        dataclasses.replace(LLAMA3, **change)


@pytest.mark.parametrize(
    ("windows", "shortest"),
    [
        ((7, 7, 7), (7,)),
        ((7, None, 7, None), (7, None)),
        ((7, None, 7), (7, None, 7)),
        ((7, None, None, 7), (7, None, None)),
        ((7, 7, 7, 7, 7, None), (7,)),  # the only layer without a window would be the sixth of four
        ((None, None, 7), (None, None, 7)),
    ],
)
def test_windows_are_normalized_to_shortest_period(windows, shortest):
    cfg = Config.debug(num_layers=4, windows=windows)
    assert cfg.windows == shortest
    assert [cfg.window(i) for i in range(4)] == [windows[i % len(windows)] for i in range(4)]


@pytest.mark.parametrize(
    "cfg",
    [
        Config.debug(),
        Config.debug(windows=(64,)),
        Config.debug(qkv_bias=True, windows=(None, 64)),
        Config.debug(qk_norm=True, tie_embeddings=False),
        Config.debug(**GEMMA_VARIANT),
        Config.debug(**GEMMA_VARIANT | dict(num_layers=9, query_scalar=None, rope_scaling=LINEAR)),
        Config.debug(rope_scaling=LINEAR),
        Config.debug(rope_scaling=LLAMA3),
        Config.debug(rope_scaling=YARN, windows=(64,)),
        Config.debug(qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, head_dim=12),
        Config.debug(tie_embeddings=False),
        Config.debug(**GPT2_VARIANT),
        Config.debug(fused_projections=True, rotary_dim=6, windows=(64,)),
        Config.debug(fused_projections=True, rope_scaling=LONGROPE),
        Config.debug(fused_projections=True, head_dim=98, rotary_dim=58),  # 58 / 98 * 98 < 58
        Config.debug(num_experts=4, num_experts_per_tok=2, windows=(64,)),
        Config.debug(num_experts=4, num_experts_per_tok=2, norm_topk_prob=False, qk_norm=True),
        Config.debug(rope_layers=(True, False), windows=(None, 64)),
        GPT_OSS,
        dataclasses.replace(GPT_OSS, rope_scaling=YARN, windows=(None,)),
        Config.debug(embedding_multiplier=3.0, attention_multiplier=0.1),
        Config.debug(
            **GPT2_VARIANT | dict(position="rope", parallel_residual=True, mlp="gelu_erf")
        ),
    ],
    ids=str,
)
def test_to_hf_then_from_hf_returns_equal_config(cfg):
    assert hf_config.from_hf(json.loads(json.dumps(hf_config.to_hf(cfg)))) == cfg


@pytest.mark.parametrize("name", [*TINY, *MORE])
def test_config_json_of_transformers_round_trips(name):
    cfg = hf_config.from_hf(hf(name))
    assert hf_config.from_hf(hf_config.to_hf(cfg)) == cfg


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "layer"},
        {"linear_bias": True},
        GPT2_VARIANT | {"num_kv_heads": 2},
        {"windows": (8, 4)},
        {"windows": (8, None), "attention_multiplier": 0.5},  # only SmolLM3 has such windows
        {"query_scalar": 4},
        {"local_rope_theta": 5.0},
        {"qk_norm": True, "post_norms": True},
    ],
    ids=str,
)
def test_to_hf_without_model_type_raises(change):
    cfg = Config.debug(**change)
    with pytest.raises(ValueError, match=naming(cfg)):
        hf_config.to_hf(cfg)


@pytest.mark.parametrize(
    ("name", "change", "facts"),
    [
        ("llama", {"model_type": "mamba"}, ["model_type", "llama", "'mamba'"]),
        ("llama", {"model_type": ["llama"]}, ["model_type", "['llama']"]),
        ("llama", {"attention_bias": True}, ["attention_bias"]),
        ("llama", {"hidden_act": "relu"}, ["hidden_act", "'silu'", "'relu'"]),
        ("qwen2", {"rope_scaling": {"factor": 8.0}}, ["rope_type", None]),
        ("gpt2", {"rope_scaling": {"factor": 8.0}}, ["rope_scaling"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, ["'yarn'", "factor"]),
        ("llama", {"rope_parameters": {"factor": 8.0}}, ["rope_type", "default", "linear", None]),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ["rope_type", "'longrope'"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "x": 1}}, ["'linear'", "factor"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            ["rope_type", "'dynamic'"],
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, ["factor", 2.0]),
        ("llama", {"rope_parameters": {"mrope_section": [8, 12]}}, ["mrope_section"]),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "mscale": "x", "factor": 2.0}},
            ["mscale", "'x'"],
        ),
        ("llama", {"rope_parameters": 5}, ["rope_parameters", 5]),
        ("llama", {"rope_scaling": 5}, ["rope_scaling", 5]),
        (
            "llama",
            {"rope_parameters": {"sliding_attention": {}}},
            ["rope_parameters", "layer"],
        ),
        ("llama", {"sliding_window": 64}, ["sliding_window", 64]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", 0.5]),
        ("mistral", {"sliding_window": 0}, ["sliding_window", 0]),
        ("qwen3", {"attention_bias": True}, ["attention_bias"]),
        ("llama", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", 30.0]),
        ("gemma3", {"final_logit_softcapping": -1.0}, ["final_logit_softcap", -1.0]),
        ("gemma2", {"attn_logit_softcapping": "50"}, ["attn_logit_softcap", "'50'"]),
        (
            "phi3",
            {"rope_parameters": LONG | {"partial_rotary_factor": 1.5}},
            ["partial_rotary_factor", 1.5],
        ),
        ("phi3", {"rope_parameters": LONG | {"long_factor": [1.0]}}, ["long_factor", 3, 1]),
        ("phi3", {"rope_parameters": LONG | {"long_factor": 2.0}}, ["long_factor", 2.0]),
        (
            "phi3",
            {"rope_parameters": LONG | {"short_factor": None}},
            ["'longrope'", "short_factor"],
        ),
        ("gpt_neox", {"hidden_act": "relu"}, ["hidden_act", "'gelu'", "'relu'"]),
        ("gpt_neox", {"attention_bias": False}, ["attention_bias", False]),
        ("olmo2", {"attention_bias": True}, ["attention_bias", True]),
        ("granite", {"attention_multiplier": 0}, ["attention_multiplier", 0]),
        ("granite", {"mlp_bias": True}, ["mlp_bias", True]),
        ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", 2]),
        ("smollm3", {"no_rope_layers": [1, "x"]}, ["no_rope_layers", "'x'"]),
        (
            "smollm3",
            {"no_rope_layers": None, "no_rope_layer_interval": 0},
            ["no_rope_layer_interval"],
        ),
        ("mixtral", {"num_experts_per_tok": 7}, ["num_experts_per_tok", 6, 7]),
        ("mixtral", {"num_local_experts": "8"}, ["num_experts", "'8'"]),
        ("mixtral", {"n_shared_experts": 1}, ["n_shared_experts", 1]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ["mlp_only_layers", 1]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step", 2]),
        ("qwen3_moe", {"first_k_dense_replace": 1}, ["first_k_dense_replace", 1]),
        ("gpt_oss", {"swiglu_limit": "7"}, ["swiglu_limit", "'7'"]),
        ("gpt_oss", {"swiglu_alpha": 2.0}, ["swiglu_alpha", 2.0]),
        ("gpt_oss", {"attention_bias": False}, ["attention_bias", False]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step", 2]),
        ("qwen3_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers", "[0]"]),
        ("qwen3_moe", {"moe_intermediate_size": None}, ["moe_intermediate_size"]),
        ("gemma3", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma3", {"layer_types": ["full_attention"]}, ["layer_types", 3]),
        ("gemma3", {"hidden_activation": "gelu"}, ["hidden_activation", "'gelu_pytorch_tanh'"]),
        ("gemma3", {"vision_config": {"hidden_size": 8}}, ["vision_config"]),
        ("llama", {"hidden_size": None}, ["hidden_size"]),
        ("llama", {"num_hidden_layers": None}, ["num_hidden_layers", None]),
        ("llama", {"hidden_size": "32"}, ["d_model", "'32'"]),
        ("llama", {"num_attention_heads": 0}, ["num_heads", 0]),
        ("llama", {"rope_interleaved": True}, ["rope_interleaved"]),
        ("qwen2", {"use_sliding_window": False}, ["layer_types", "sliding_window"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ["layer_types", 2, 3]),
        ("qwen2", {"layer_types": ["full_attention", "linear"]}, ["layer_types", "linear"]),
        ("qwen2", {"layer_types": 3}, ["layer_types", 2, 3]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights"]),
        ("gpt2", {"activation_function": "relu"}, ["activation_function", "'gelu_new'", "'relu'"]),
    ],
    ids=str,
)
def test_unsupported_key_or_value_is_rejected(name, change, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        hf_config.from_hf(hf(name, **change))


@pytest.mark.parametrize("name", [*TINY, *MORE])
def test_value_of_any_type_is_read_or_raises_value_error(name):
    """Bug: a list as the type of a RoPE scaling raised TypeError."""
    more = ("rope_scaling", "rope_parameters", "sliding_window_pattern", "rope_local_base_freq")
    more += ("partial_rotary_factor", "rotary_pct", "rotary_emb_base", "num_local_experts")
    for key in (*hf(name), *more):
        for value in INVALID_VALUES:
            with contextlib.suppress(ValueError):  # any other exception fails the test
                hf_config.from_hf(hf(name, **{key: value}))


def test_disabled_window_of_qwen2_is_ignored():
    off = dict(use_sliding_window=False, layer_types=["full_attention"] * 2)
    stated = hf_config.from_hf(hf("qwen2", sliding_window=4096, **off))
    assert stated == hf_config.from_hf(hf("qwen2", **off)) and stated.windows == (None,)


def from_transformers_4(name: str, **changes) -> Config:
    """Read a golden config without the keys that only transformers 5 writes."""
    config = hf(name, **changes)
    del config["rope_parameters"]
    return hf_config.from_hf(config)


def test_config_of_transformers_4_is_read_like_that_of_5():
    linear = {"type": "linear", "factor": 8.0}
    cfg = from_transformers_4("llama", rope_theta=500.0, rope_scaling=linear)
    assert cfg.rope_theta == 500 and cfg.rope_scaling == LINEAR
    llama3 = {"original_max_position_embeddings": 16, "rope_type": "llama3", "factor": 8.0}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert from_transformers_4("llama", rope_theta=500.0, rope_scaling=llama3) == hf_config.from_hf(
        hf("llama")
    )
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
    yarn["beta_slow"] = None  # null is treated as absent
    assert from_transformers_4("qwen3", rope_scaling=yarn) == hf_config.from_hf(hf("qwen3"))
    gemma = from_transformers_4(
        "gemma3", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear
    )
    assert gemma == hf_config.from_hf(hf("gemma3"))


def test_absent_keys_have_defaults_of_transformers():
    config = hf("gemma3")
    for key in ("layer_types", "_sliding_window_pattern", "rope_parameters", "sliding_window"):
        del config[key]
    cfg = hf_config.from_hf(config)
    assert cfg.windows == (4096, 4096, None)
    assert (cfg.rope_theta, cfg.local_rope_theta) == (1e6, 1e4)
    silent = {k: v for k, v in hf("mistral").items() if k != "sliding_window"}
    assert hf_config.from_hf(silent).windows == (4096,)
    qwen = hf("qwen2", max_window_layers=1, sliding_window=9)
    del qwen["layer_types"]
    assert hf_config.from_hf(qwen).windows == (None, 9)


def test_softcap_is_none_if_null_and_default_if_absent():
    """As in transformers, null disables a soft cap that has a default."""
    assert hf_config.from_hf(hf("gemma2", attn_logit_softcapping=None)).attn_logit_softcap is None
    config = hf("gemma2")
    del config["attn_logit_softcapping"], config["final_logit_softcapping"]
    cfg = hf_config.from_hf(config)
    assert (cfg.attn_logit_softcap, cfg.final_logit_softcap) == (50.0, 30.0)


def test_old_rope_types_of_longrope_are_read():
    keys = dict(short_factor=LONG["short_factor"], long_factor=LONG["long_factor"])
    expected = hf_config.from_hf(hf("phi3"))
    for name in ("su", "yarn", "longrope"):
        config = hf("phi3", rope_scaling=dict(type=name, **keys), rope_theta=1e4)
        assert hf_config.from_hf(config) == expected
    assert expected.rope_scaling.attention_factor == pytest.approx((1 + 5 / 4) ** 0.5)
