"""Which named tensors of a checkpoint make up each weight of the decoder.

One table a naming scheme: Hugging Face (gpt2; llama and qwen2) and GGUF. A weight of ours may be
several tensors of theirs stacked along the rows (queries, keys and values), and a tensor may need
its axes or rows put right on the way; `Source` says both, and works in either direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from transformer.config import Config
from transformer.decoder import Layer, Params
from transformer.layers import Linear, Norm


@dataclass(frozen=True)
class Source:
    """Where one weight comes from."""

    names: tuple[str, ...]  # tensors, stacked along the rows
    rows: tuple[int, ...]  # how many rows each contributes
    is_transposed: bool = False  # stored [in, out] (the Conv1D of GPT-2)
    is_interleaved: tuple[bool, ...] = ()  # per name: rotary pairs stand side by side (GGUF llama)


# Our part -> their names. "{i}" is the layer.
_HF_LLAMA = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "out": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_HF_GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "attn_norm": "transformer.h.{i}.ln_1",
    "qkv": "transformer.h.{i}.attn.c_attn",
    "out": "transformer.h.{i}.attn.c_proj",
    "mlp_norm": "transformer.h.{i}.ln_2",
    "up": "transformer.h.{i}.mlp.c_fc",
    "down": "transformer.h.{i}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
_GGUF = {
    "embed": "token_embd",
    "positions": "position_embd",
    "attn_norm": "blk.{i}.attn_norm",
    "qkv": "blk.{i}.attn_qkv",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "out": "blk.{i}.attn_output",
    "mlp_norm": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}


def sources(cfg: Config, scheme: str, *, architecture: str) -> Params:
    """The tree of `Params` with a `Source` at each leaf.

    Args:
        scheme: "hf" or "gguf".
        architecture: model_type or general.architecture: "gpt2", "llama" or "qwen2".
    """
    is_gpt2, is_gguf = architecture == "gpt2", scheme == "gguf"
    table = _GGUF if is_gguf else _HF_GPT2 if is_gpt2 else _HF_LLAMA
    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    # llama.cpp reorders queries and keys of this one architecture for its own rotary kernel.
    is_interleaved = is_gguf and architecture == "llama"

    def linear(parts: str, rows: tuple[int, ...], has_bias: bool, i: int = 0) -> Linear:
        names = [table[part].format(i=i) for part in parts.split()]
        interleaved = tuple(is_interleaved and part in ("q", "k") for part in parts.split())
        weight = Source(
            tuple(f"{name}.weight" for name in names),
            rows,
            is_transposed=is_gpt2 and not is_gguf and parts not in ("embed", "head"),
            is_interleaved=interleaved,
        )
        bias = Source(tuple(f"{name}.bias" for name in names), rows, is_interleaved=interleaved)
        return Linear(weight=weight, bias=bias if has_bias else None)

    def norm(part: str, i: int = 0) -> Norm:
        name = table[part].format(i=i)
        scale = Source((f"{name}.weight",), (cfg.d_model,))
        bias = Source((f"{name}.bias",), (cfg.d_model,))
        return Norm(scale=scale, bias=bias if cfg.norm == "layer" else None)

    def layer(i: int) -> Layer:
        qkv_rows = (heads, kv_heads, kv_heads)
        return Layer(
            attn_norm=norm("attn_norm", i),
            qkv=linear("qkv", (sum(qkv_rows),), cfg.qkv_bias, i)
            if is_gpt2
            else linear("q k v", qkv_rows, cfg.qkv_bias, i),
            out=linear("out", (cfg.d_model,), cfg.linear_bias, i),
            mlp_norm=norm("mlp_norm", i),
            up=linear("gate up", (cfg.d_ff, cfg.d_ff), cfg.linear_bias, i)
            if cfg.mlp == "swiglu"
            else linear("up", (cfg.d_ff,), cfg.linear_bias, i),
            down=linear("down", (cfg.d_model,), cfg.linear_bias, i),
        )

    embed = linear("embed", (cfg.vocab_size,), False)
    return Params(
        embed=embed,
        positions=Source((f"{table['positions']}.weight",), (cfg.max_seq_len,))
        if cfg.position == "learned"
        else None,
        layers=tuple(layer(i) for i in range(cfg.num_layers)),
        final_norm=norm("final_norm"),
        head=None if cfg.tie_embeddings else linear("head", (cfg.vocab_size,), False),
    )


def all_names(tree: Params) -> list[str]:
    """Every tensor name a tree of sources mentions."""
    return [name for source in jax.tree.leaves(tree) for name in source.names]
