"""Parity tests of every family with transformers, on longer sequences than the golden files."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.transformer import comparisons
from tests.transformer.comparisons import LENGTH, TOLERANCE, reference
from tests.transformer.conftest import MORE, TINY
from tests.transformer.quantized import quantized
from training.recipes.decoder import next_token_loss
from transformer import cache, checkpoint, config_keys, decoder, hf_config, lora, rope

pytestmark = pytest.mark.parity


@pytest.fixture(params=[*TINY, *MORE])
def both(request, tmp_path):
    """Return the weights and config of Pellucid, the model of transformers, ids, its logits."""
    pytest.importorskip("transformers")
    return comparisons.load_both(request.param, tmp_path)


def test_forward_matches_transformers(both):
    assert comparisons.logits_difference(both) <= TOLERANCE


def test_forward_cached_matches_transformers(both):
    assert comparisons.cached_difference(both) <= TOLERANCE


def test_each_part_matches_transformers(both):
    assert max(comparisons.part_differences(both).values()) <= TOLERANCE


def test_saved_folder_loads_in_transformers_bitwise_equal(both, tmp_path):
    import torch
    import transformers

    params, cfg, model, ids, expected = both
    checkpoint.save(tmp_path / "ours", params, cfg)
    path = tmp_path / "ours" / "config.json"  # some defaults exceed the tiny vocabulary
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    reloaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs, ours = model.state_dict(), reloaded.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    with torch.inference_mode():
        np.testing.assert_array_equal(reloaded.eval()(ids).logits.numpy(), expected)


def test_longrope_of_rows_with_different_lengths_matches_transformers(tmp_path):
    """The length of a row selects the LongRoPE factors; with a cache, the served context does."""
    import torch

    model, ids = reference("phi3")
    model.save_pretrained(tmp_path)
    params, cfg, _ = checkpoint.load(tmp_path)
    ids, original = ids[:, :24].numpy(), cfg.rope_scaling.original_max_seq_len
    for length in (original, original + 1, 24):
        with torch.inference_mode():
            expected = model(torch.tensor(ids[:, :length])).logits.numpy()
        logits, _ = decoder.forward(params, cfg, ids[:, :length])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    short = dataclasses.replace(cfg, max_seq_len=original)  # a context without extension
    tables, starts = np.array([[1]]), np.array([0])
    x, _ = decoder.forward_cached(params, short, cache.init(cfg, 1), ids[:, :16], tables, starts)
    with torch.inference_mode():
        expected = model(torch.tensor(ids[:, :16])).logits.numpy()
    np.testing.assert_allclose(decoder.unembed(params, short, x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*TINY, *MORE])
def test_loss_and_gradients_match_torch(name, tmp_path):
    """The gradients pass through the chunked loss of training and blockwise attention."""
    import torch

    model, ids = reference(name)
    ids = ids[:, :40].clone()
    model.save_pretrained(tmp_path)
    params, cfg, _ = checkpoint.load(tmp_path)
    batch = {"ids": ids.numpy(), "segments": np.ones_like(ids), "weights": np.ones(ids.shape, "f4")}

    def mean_loss(params):
        loss, weight, _ = next_token_loss(params, cfg, batch, "float32")
        return loss / weight

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    model.zero_grad()
    expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    for parameter in model.parameters():  # save gradients as weights, to load them as our tree
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    model.save_pretrained(tmp_path / "gradients")
    model.zero_grad()
    reference.cache_clear()
    theirs, _, _ = checkpoint.load(tmp_path / "gradients")
    for (path, ours), other in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(
            ours, other, rtol=0, atol=1e-4 * max(1, np.abs(other).max()), err_msg=str(path)
        )


LORA_TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "olmo2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    **dict.fromkeys(("mixtral", "gpt_oss"), ["q_proj", "k_proj", "v_proj", "o_proj"]),
}


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_logits_with_adapter_match_peft(name, tmp_path):
    """Phi-3 and GPT-NeoX have projections that share one tensor, and therefore one A."""
    import torch

    peft = pytest.importorskip("peft")
    model, ids = reference(name)
    reference.cache_clear()  # PEFT changes the model
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=LORA_TARGETS[name])
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = ids[:, :40]
    with torch.inference_mode():
        expected = adapted(ids).logits.numpy()
    params, cfg, _ = checkpoint.load(tmp_path / "base")
    adapter = lora.load(tmp_path / "adapter", cfg)
    lora.save(tmp_path / "again", adapter, cfg)
    again = lora.load(tmp_path / "again", cfg)
    for change, other in ((lora.apply, adapter), (lora.merge, adapter), (lora.apply, again)):
        adapted_params = change(params, other)
        logits, _ = decoder.forward(adapted_params, cfg, ids.numpy())
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_mxfp4_is_dequantized_as_by_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    names = quantized(tmp_path)
    header = checkpoint.read_header(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in names:
        parts = (torch.tensor(tensors[name + suffix]) for suffix in ("_blocks", "_scales"))
        expected = convert_moe_packed_tensors(*parts, dtype=torch.float32)
        actual = header.tensors[name].read(0, len(expected))
        np.testing.assert_array_equal(actual, expected)


def test_experts_in_one_tensor_that_transformers_saves(tmp_path):
    model, _ = reference("qwen3_moe")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "all", save_original_format=False)
    names = checkpoint.read_header(tmp_path / "all").tensors
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    (params, cfg, _), (expected, same_cfg, _) = map(
        checkpoint.load, (tmp_path / "all", tmp_path / "one")
    )
    assert cfg == same_cfg
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_rotary_frequencies_and_angles_match_transformers(name, tmp_path):
    """The RoPE scaling is llama3, none, yarn and linear; layers with a window are not scaled."""
    import torch

    model, _ = reference(name)
    model.save_pretrained(tmp_path)
    _, cfg, _ = checkpoint.load(tmp_path)
    module, positions = model.model.rotary_emb, torch.arange(LENGTH)[None]
    if name != "gemma3":
        pairs = [(module.inv_freq, module(torch.zeros(1), positions), cfg)]
    else:
        local = dataclasses.replace(cfg, rope_theta=cfg.local_rope_theta, rope_scaling=None)
        pairs = [
            (
                getattr(module, f"{kind}_inv_freq"),
                module(torch.zeros(1), positions, kind),
                layer_cfg,
            )
            for kind, layer_cfg in (("full_attention", cfg), ("sliding_attention", local))
        ]
    for frequency, rotated, layer_cfg in pairs:
        actual = rope.frequencies(layer_cfg.head_dim, layer_cfg.rope_theta, layer_cfg.rope_scaling)
        np.testing.assert_allclose(actual, frequency, rtol=1e-6)
        angles = rope.angles(
            positions.numpy(), layer_cfg.head_dim, layer_cfg.rope_theta, layer_cfg.rope_scaling
        )
        for ours, theirs in zip(angles, rotated, strict=True):
            half = theirs[..., : layer_cfg.head_dim // 2]
            np.testing.assert_allclose(ours[:, :, 0], half, rtol=0, atol=1e-4)


TOLERATED = {  # keys that are ignored in every family
    "unsloth_fixed": True,
    "_num_labels": 1,
    "gradient_checkpointing": True,
    "quantization_config": None,
    "temperature": 0.9,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "num_experts": 0,
    "partial_rotary_factor": None,
    "frobnicate": {"x": [1]},
}
TOLERATED_OF = {
    "gpt2": {
        "reorder_and_upcast_attn": True,
        "activation_function": "gelu_pytorch_tanh",
        "n_ctx": 7,
    },
    "llama": {"sliding_window": 7, "use_sliding_window": False, "max_window_layers": 1},
    "qwen2": {"attention_bias": False, "use_mrope": False},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3},
    "mixtral": {"num_experts": 6, "router_jitter_noise": 0.1},
    "qwen3_moe": {"num_experts": 6, "intermediate_size": 7, "router_aux_loss_coef": 1.0},
    "gpt_oss": {"num_experts": 4, "experts_per_token": 7, "initial_context_length": 7},
}


@pytest.mark.parametrize("name", [*TINY, *MORE])
def test_ignored_key_has_no_effect_in_transformers(name, tmp_path):
    import torch
    import transformers

    model, ids = reference(name)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    keys = TOLERATED | TOLERATED_OF.get(name, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    params, cfg, _ = checkpoint.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    with torch.inference_mode():
        expected = theirs.eval()(ids[:, :64]).logits.numpy()
    logits, _ = decoder.forward(params, cfg, ids[:, :64].numpy())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "more"),
    [
        (dict(type="yarn", factor=4.0, finetuned=True), {}),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), {}),
        (dict(type="yarn", factor=4.0), dict(original_max_position_embeddings=64)),
        (dict(type="yarn", factor=None, original_max_position_embeddings=64), {}),
        (dict(type="yarn", factor=8.0, mscale=0.7, mscale_all_dim=1.2), {}),
        (dict(type="yarn", factor=8.0, mscale=0.7, mscale_all_dim=None), {}),
        (dict(type="yarn", factor=8.0, mscale=0.7, attention_factor=1.5), {}),
        (dict(type="yarn", factor=8.0, beta_fast=0, beta_slow=None), {}),
        (dict(type="yarn", factor=8.0, truncate=False, beta_fast=4), {}),
        (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), {}),
        (dict(rope_type="linear", type="yarn", factor=8.0, beta_fast=4, frobnicate=1), {}),
        ({}, {}),
        (dict(rope_type="default", original_max_position_embeddings=64), {}),
    ],
    ids=str,
)
def test_rope_scaling_matches_transformers(scaling, more):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = dict(
        hidden_size=128,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=64,
        max_position_embeddings=256,
        rope_theta=5e4,
        **more,
    )
    cfg = hf_config.from_hf(
        {"model_type": "llama", "vocab_size": 9, "rope_scaling": scaling} | sizes
    )
    module = LlamaRotaryEmbedding(LlamaConfig(rope_scaling=dict(scaling), **sizes))
    actual = rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    np.testing.assert_allclose(actual, module.inv_freq, rtol=1e-5)
    positions = torch.arange(300)[None]
    cos, _ = rope.angles(positions.numpy(), cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    theirs, _ = module(torch.zeros(1), positions)
    np.testing.assert_allclose(cos[:, :, 0], theirs[..., : cfg.head_dim // 2], rtol=0, atol=1e-4)
    assert hf_config.from_hf(hf_config.to_hf(cfg)) == cfg


def test_key_table_covers_configs_of_transformers():
    """Every key of a causal model that scales, caps or rotates is in the table."""
    transformers = pytest.importorskip("transformers")
    name = re.compile(
        r"multiplier|soft_?cap|logits?_scal|scale_emb|scale_depth|rotary|alibi$|clip_qkv|"
        r"no_rope|parallel_(attn|residual)|qk_(norm|layernorm|ln)|(qkv|mlp|attention|use)_bias$|"
        r"(num|n)_(routed_|local_)?experts$|chunk_size$|temperature_tuning|bidirectional_att"
    )
    excluded = {  # refinements of a key in the table, sound, pictures, state-space layers
        "ssm_in_multiplier", "ssm_multipliers", "ssm_out_multiplier", "mamba_chunk_size",
        "chunk_size", "moe_router_logit_softcapping", "block_ffn_dim_multiplier", "conv_bias",
        "conf_attention_chunk_size", "num_ln_in_parallel_attn", "depthwise_multiplier",
        "channel_multiplier", "logit_scale_init_value", "use_rotary_embedding",
    }  # fmt: skip
    actual = set()
    for path in Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        if any("ForCausalLM" in p.read_text("utf-8") for p in path.parent.glob("modeling_*.py")):
            text = path.read_text("utf-8")
            actual |= {key for key in re.findall(r"^    (\w+):", text, re.M) if name.search(key)}
    assert len(actual) > 30
    assert actual - config_keys.CONFIG.keys() - excluded == set()
