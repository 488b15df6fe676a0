"""Config: what it refuses, and the way to and from a Hugging Face config.json."""

import json

import pytest

from tests.transformer.conftest import GOLDEN, TINY
from transformer.config import Config

GPT2_FORMS = dict(
    norm="layer", position="learned", mlp="gelu", qkv_bias=True, linear_bias=True, num_kv_heads=4
)


def hf(name: str, **changes) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def test_debug_is_small_and_hashable():
    assert Config.debug().num_params < 50_000
    assert hash(Config.debug()) == hash(Config.debug())
    assert Config.debug(d_ff=56) != Config.debug()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"d_model": 32.0}, "d_model must be a positive integer, got 32.0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"norm": "batch"}, "norm must be one of .*, got 'batch'"),
        ({"mlp": None}, "mlp must be one of .*, got None"),
        ({"norm_eps": 0.0}, "norm_eps must be positive and finite"),
        ({"rope_theta": float("nan")}, "rope_theta must be positive and finite, got nan"),
        ({"rope_theta": "10000"}, "rope_theta must be positive and finite, got '10000'"),
        ({"tie_embeddings": 1}, "tie_embeddings must be True or False, got 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Config.debug(**change)


@pytest.mark.parametrize(
    "cfg",
    [
        Config.debug(),
        Config.debug(qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, head_dim=12),
        Config.debug(tie_embeddings=False),
        Config.debug(**GPT2_FORMS),
    ],
    ids=["llama", "qwen2", "untied", "gpt2"],
)
def test_to_hf_is_undone_by_from_hf(cfg):
    assert Config.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


@pytest.mark.parametrize("name", TINY)
def test_what_transformers_writes_is_read(name):
    cfg = Config.from_hf(hf(name))
    assert Config.from_hf(cfg.to_hf()) == cfg


@pytest.mark.parametrize(
    "change",
    [{"norm": "layer"}, {"linear_bias": True}, GPT2_FORMS | {"num_kv_heads": 2}],
    ids=str,
)
def test_what_no_model_type_has_is_not_written(change):
    with pytest.raises(ValueError, match="no Hugging Face model type|has no place for"):
        Config.debug(**change).to_hf()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"model_type": "mamba"}, "model_type must be one of .*, got 'mamba'"),
        ("llama", {"model_type": ["llama"]}, "model_type must be one of"),
        ("llama", {"frobnicate": 1}, "'frobnicate', whose meaning is not known"),
        ("llama", {"attention_bias": True}, "attention_bias must be False"),
        ("llama", {"hidden_act": "relu"}, "hidden_act must be 'silu'"),
        ("llama", {"rope_scaling": {"factor": 8.0}}, "rope_scaling must be None"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters must be of"),
        ("llama", {"rope_parameters": 5}, "rope_parameters must be of"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("llama", {"hidden_size": "32"}, "must be a positive integer, got '32'"),
        ("llama", {"num_attention_heads": 0}, "must be a positive integer, got 0"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved must be False"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be False"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types must all be"),
        ("qwen2", {"layer_types": 3}, "layer_types must all be"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights must be True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function must be 'gelu_new'"),
    ],
    ids=str,
)
def test_an_unknown_meaning_is_refused(name, change, said):
    with pytest.raises(ValueError, match=said):
        Config.from_hf(hf(name, **change))


def test_qwen2_may_state_a_window_that_is_off():
    assert Config.from_hf(hf("qwen2", sliding_window=4096)) == Config.from_hf(hf("qwen2"))
