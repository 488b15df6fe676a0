"""Make a tiny random decoder of each family with transformers, and the results of transformers.

    python make_tiny.py [FAMILY...]

It needs torch and transformers (`pip install -e '.[parity]'`). Each family has a folder with
config.json and safetensors as transformers saves them (in several shards for mistral) and
golden.npz, in float32 except the ids. T = 24 tokens are more than every window and than the
original contexts of RoPE scaling:

    ids [1, T]
    logits [1, T, V]
    stream [L, 1, T, D]         input of each block; the last is the output of the last block
    attention [L, 1, N, T, T]   attention weights
    PART [L, 1, T, ...]         output of each part of a block: attn_norm q k v q_norm k_norm out
                                attn_post_norm mlp_norm up gate mlp mlp_post_norm, and
                                router_weights and router_experts [L, T, k]
    versions                    software versions

All weights are random, including biases and norms: zeros and ones would hide mistakes.
"""

import collections
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0
)
GEMMA = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 2.5, 9.0],
    original_max_position_embeddings=16,
)  # fmt: skip
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": transformers.LlamaConfig(  # heads wider than hidden_size / num_attention_heads
        **SIZES, head_dim=12, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=LLAMA3
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=7),
    "qwen2": transformers.Qwen2Config(
        **SIZES,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3": transformers.Qwen3Config(
        **SIZES, head_dim=12, tie_word_embeddings=True, rope_parameters=YARN
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | dict(num_hidden_layers=3, num_key_value_heads=1),
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=5,
        sliding_window_pattern=3,
        rope_parameters=GEMMA,
    ),
    "gemma": transformers.GemmaConfig(**SIZES, head_dim=12),
    "gemma2": transformers.Gemma2Config(
        **SIZES,
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "phi3": transformers.Phi3Config(  # T is longer than the original context
        **SIZES,
        sliding_window=7,
        original_max_position_embeddings=16,
        partial_rotary_factor=0.75,
        rope_parameters=LONGROPE,
        pad_token_id=0,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.5),
    ),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "granite": transformers.GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.2,
        logits_scaling=4.0,
    ),
    "smollm3": transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0], pad_token_id=0),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES,
        head_dim=12,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    ),
    "gpt_oss": transformers.GptOssConfig(  # widths of whole blocks of MXFP4; the limit clips
        **SIZES | dict(intermediate_size=64),
        head_dim=12,
        sliding_window=7,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=1.0,
        rope_parameters=YARN | dict(truncate=False),
    ),
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn": "out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp": "mlp",
    "mlp.gate": "router",
    "mlp.router": "router",
    "self_attn.qkv_proj": "qkv",
    "mlp.gate_up_proj": "gate_up",
}
OLMO_PARTS = PARTS | {
    "post_attention_layernorm": "attn_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
GPT2_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "qkv",
    "attn": "out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "up",
    "mlp": "mlp",
}
GPT_NEOX_PARTS = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "qkv",
    "attention": "out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "up",
    "mlp": "mlp",
}
PARTS_OF = {
    "gpt2": GPT2_PARTS,
    "gpt_neox": GPT_NEOX_PARTS,
    "olmo2": OLMO_PARTS,
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA_PARTS),
}


def random_model(config: transformers.PretrainedConfig):
    """Return a float32 model with random weights."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    for key, parameter in model.named_parameters():
        # Gemma adds one to the weights of its norms.
        is_scale = (
            parameter.ndim == 1 and key.endswith("weight") and "gemma" not in config.model_type
        )
        parameter.data.normal_(1.0 if is_scale else 0.0, 0.2)
    return model


@torch.inference_mode()
def intermediates(model, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the outputs of every part of every block, see above."""
    config, kind = model.config, model.config.model_type
    blocks = model.transformer.h if kind == "gpt2" else model.base_model.layers
    names = PARTS_OF.get(kind, PARTS)
    outputs = collections.defaultdict(list)

    def record(name: str):
        def hook(module, inputs, output):
            if name == "router":
                outputs["router_weights"].append(output[1])
                outputs["router_experts"].append(output[2])
                return
            outputs[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, inputs: outputs["stream"].append(inputs[0]))
    ]
    for block in blocks:
        hooks.append(block.register_forward_hook(record("stream")))
        for name, module in block.named_modules():
            if name in names:
                hooks.append(module.register_forward_hook(record(names[name])))
    out = model(ids, output_attentions=True)
    for hook in hooks:
        hook.remove()
    if kind == "gpt_neox":  # by heads
        heads = config.num_attention_heads
        outputs["qkv"] = [
            qkv.unflatten(-1, (heads, 3, -1)).transpose(2, 3).flatten(2) for qkv in outputs["qkv"]
        ]
    if "qkv" in outputs:
        kv_size = model.config.hidden_size
        if kind == "phi3":
            kv_size = kv_size // config.num_attention_heads * config.num_key_value_heads
        sizes = (config.hidden_size, kv_size, kv_size)
        parts = [qkv.split(sizes, -1) for qkv in outputs.pop("qkv")]
        outputs |= {name: [part[i] for part in parts] for i, name in enumerate("qkv")}
    if "gate_up" in outputs:
        parts = [both.chunk(2, -1) for both in outputs.pop("gate_up")]
        outputs |= {name: [part[i] for part in parts] for i, name in enumerate(("gate", "up"))}
    return {
        "logits": out.logits.numpy(),
        "attention": torch.stack(out.attentions).numpy(),
        **{name: torch.stack(parts).numpy() for name, parts in outputs.items()},
    }


def make(name: str, config: transformers.PretrainedConfig) -> None:
    model = random_model(config)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="40KB" if name == "mistral" else "5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(config.vocab_size, (1, 24))
    np.savez_compressed(
        folder / "golden.npz",
        ids=ids.numpy().astype(np.int32),
        **intermediates(model, ids),
        versions=versions(),
    )


def versions() -> str:
    """Return the versions of the software that made a golden file."""
    packages = [f"{name} {version(name)}" for name in ("numpy", "torch", "transformers")]
    return ", ".join([f"python {platform.python_version()}", *packages])


if __name__ == "__main__":
    for name in sys.argv[1:] or CONFIGS:
        make(name, CONFIGS[name])
