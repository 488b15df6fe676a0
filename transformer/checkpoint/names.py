"""Mapping from the weights of the decoder to the named tensors of a checkpoint.

There is one table per naming scheme: Hugging Face (GPT-2; Llama and similar; Gemma 3) and GGUF. A
`TensorSource` describes how to convert a tensor to a weight: some are transposed, have interleaved
rows or an offset, and GPT-2 stores queries, keys and values in one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from transformer.config import Config
from transformer.decoder import Layer, Params
from transformer.weights import Linear, Norm


@dataclass(frozen=True)
class TensorSource:
    """Tensor of a checkpoint that holds a weight, and how to convert it."""

    name: str
    first_row: int = 0  # of the tensor, after the transposition
    is_transposed: bool = False  # stored as [in, out] (the Conv1D of GPT-2)
    is_interleaved: bool = False  # rotary pairs are adjacent rows (GGUF llama)
    is_shifted: bool = False  # stored plus one (GGUF gemma3 norms)


# Field of `Layer` or `Params` -> tensor name without suffix. "{i}" is the layer.
_HF_LLAMA = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "out": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_HF_GEMMA3 = _HF_LLAMA | {  # post_attention_layernorm is another norm than in Llama
    "attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_HF_GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "attn_norm": "transformer.h.{i}.ln_1",
    "q": "transformer.h.{i}.attn.c_attn",
    "k": "transformer.h.{i}.attn.c_attn",
    "v": "transformer.h.{i}.attn.c_attn",
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
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "out": "blk.{i}.attn_output",
    "attn_post_norm": "blk.{i}.post_attention_norm",
    "mlp_norm": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
    "mlp_post_norm": "blk.{i}.post_ffw_norm",
    "final_norm": "output_norm",
    "head": "output",
}


def tensor_sources(cfg: Config, scheme: str, *, architecture: str) -> Params:
    """Return the tree of `Params` with a `TensorSource` at each leaf.

    Args:
        cfg: Config of the decoder.
        scheme: Naming scheme, "hf" or "gguf".
        architecture: model_type of config.json or general.architecture of the GGUF file.

    Returns:
        The tree.
    """
    is_gpt2, is_gguf = architecture == "gpt2", scheme == "gguf"
    if is_gguf:
        table = _GGUF | (dict.fromkeys("qkv", "blk.{i}.attn_qkv") if is_gpt2 else {})
    else:
        table = {"gpt2": _HF_GPT2, "gemma3_text": _HF_GEMMA3}.get(architecture, _HF_LLAMA)
    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    first_row = {"q": 0, "k": heads, "v": heads + kv_heads} if is_gpt2 else {}
    leaf: Any = TensorSource  # takes the place of an array in the tree

    def linear(part: str, has_bias: bool, i: int = 0) -> Linear:
        def source(kind: str) -> Any:
            return leaf(
                f"{table[part].format(i=i)}.{kind}",
                first_row.get(part, 0),
                is_transposed=is_gpt2
                and not is_gguf
                and kind == "weight"
                and part not in ("embed", "head"),
                # llama.cpp reorders queries and keys of this one architecture for its own kernel.
                is_interleaved=is_gguf and architecture == "llama" and part in ("q", "k"),
            )

        return Linear(weight=source("weight"), bias=source("bias") if has_bias else None)

    def norm(part: str, i: int = 0) -> Norm:
        name = table[part].format(i=i)
        bias = leaf(f"{name}.bias") if cfg.norm == "layer" else None
        is_shifted = is_gguf and cfg.norm == "unit_rms"
        return Norm(scale=leaf(f"{name}.weight", is_shifted=is_shifted), bias=bias)

    def layer(i: int) -> Layer:
        return Layer(
            attn_norm=norm("attn_norm", i),
            q=linear("q", cfg.qkv_bias, i),
            k=linear("k", cfg.qkv_bias, i),
            v=linear("v", cfg.qkv_bias, i),
            q_norm=norm("q_norm", i) if cfg.qk_norm else None,
            k_norm=norm("k_norm", i) if cfg.qk_norm else None,
            out=linear("out", cfg.linear_bias, i),
            attn_post_norm=norm("attn_post_norm", i) if cfg.post_norms else None,
            mlp_norm=norm("mlp_norm", i),
            gate=None if cfg.mlp == "gelu" else linear("gate", cfg.linear_bias, i),
            up=linear("up", cfg.linear_bias, i),
            down=linear("down", cfg.linear_bias, i),
            mlp_post_norm=norm("mlp_post_norm", i) if cfg.post_norms else None,
        )

    return Params(
        embed=linear("embed", False),
        positions=leaf(f"{table['positions']}.weight") if cfg.position == "learned" else None,
        layers=tuple(layer(i) for i in range(cfg.num_layers)),
        final_norm=norm("final_norm"),
        head=None if cfg.tie_embeddings else linear("head", False),
    )


def rows_per_tensor(tree: Params, shapes: Params) -> dict[str, int]:
    """Return the number of rows of each tensor: the sum over the weights stored in it.

    Args:
        tree: Tree of `TensorSource`.
        shapes: The same tree with leaves that have a `.shape`.

    Returns:
        Tensor name -> number of rows, after the transposition.
    """
    rows: dict[str, int] = {}
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shapes), strict=True)
    for source, leaf in pairs:
        rows[source.name] = rows.get(source.name, 0) + leaf.shape[0]
    return rows
