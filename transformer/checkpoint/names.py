"""Map the weights of the decoder to the named tensors of a checkpoint.

There is one table per naming scheme: Hugging Face (Llama, and families that differ from it) and
GGUF. A `TensorSource` describes how to convert a tensor to a weight: a tensor can be transposed,
have interleaved rows, or be stored plus one; several weights can share one tensor; and the experts
of a layer have one tensor each or one for all.

transformers 5 holds all experts of a layer in one tensor, with gate and up together. It writes them
as one tensor per expert unless `save_original_format=False`; both layouts are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from transformer.config import GATED_MLPS, Config
from transformer.decoder import Layer, Params
from transformer.weights import Linear, Norm


@dataclass(frozen=True)
class TensorSource:
    """The tensor of a checkpoint that contains a weight, and how to convert it to the weight."""

    name: str  # with "{e}" for the index of the expert if each expert has its own tensor
    first_row: int = 0  # first row of the weight in the tensor, after the transposition
    # Rows alternate with those of other weights: of every `stride` rows, this weight has `group`
    # rows from `first_row` on. 0: its rows are contiguous.
    stride: int = 0
    group: int = 0
    has_experts: bool = False  # all experts of a layer, on a first axis
    is_transposed: bool = False  # stored as [in, out] (the Conv1D of GPT-2)
    is_interleaved: bool = False  # rotary pairs are adjacent rows (GGUF llama)
    is_shifted: bool = False  # stored plus one (GGUF gemma norms)


# Field of `Layer` or `Params` -> tensor name without suffix. "{i}" is the layer.
_HF_LLAMA = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "sinks": "model.layers.{i}.self_attn.sinks",
    "out": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_HF_POST_NORMS = {  # post_attention_layernorm is another norm than in Llama
    "attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_HF_FUSED = {
    **dict.fromkeys("qkv", "model.layers.{i}.self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "model.layers.{i}.mlp.gate_up_proj"),
}
_HF_EXPERTS = {
    "router": "model.layers.{i}.mlp.gate",
    "gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "down": "model.layers.{i}.mlp.experts.{e}.down_proj",
}
_HF_JOINED_EXPERTS = {  # names of tensors, without a suffix
    "router": "model.layers.{i}.mlp.gate",
    "gate": "model.layers.{i}.mlp.experts.gate_up_proj",
    "up": "model.layers.{i}.mlp.experts.gate_up_proj",
    "down": "model.layers.{i}.mlp.experts.down_proj",
}
_HF_GPT_OSS = _HF_JOINED_EXPERTS | {"router": "model.layers.{i}.mlp.router"}
_HF_MIXTRAL = {
    "router": "model.layers.{i}.block_sparse_moe.gate",
    "gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
_HF_GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "attn_norm": "transformer.h.{i}.ln_1",
    **dict.fromkeys("qkv", "transformer.h.{i}.attn.c_attn"),
    "out": "transformer.h.{i}.attn.c_proj",
    "mlp_norm": "transformer.h.{i}.ln_2",
    "up": "transformer.h.{i}.mlp.c_fc",
    "down": "transformer.h.{i}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
_HF_GPT_NEOX = {
    "embed": "gpt_neox.embed_in",
    "attn_norm": "gpt_neox.layers.{i}.input_layernorm",
    **dict.fromkeys("qkv", "gpt_neox.layers.{i}.attention.query_key_value"),
    "out": "gpt_neox.layers.{i}.attention.dense",
    "mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
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
    "sinks": "blk.{i}.attn_sinks.weight",
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
_GGUF_QKV = dict.fromkeys("qkv", "blk.{i}.attn_qkv")
_GGUF_EXPERTS = {
    "router": "blk.{i}.ffn_gate_inp",
    "gate": "blk.{i}.ffn_gate_exps",
    "up": "blk.{i}.ffn_up_exps",
    "down": "blk.{i}.ffn_down_exps",
}
# llama.cpp reorders queries and keys of these architectures for its own kernel.
_GGUF_INTERLEAVED = ("llama", "granite", "smollm3")


def _table(cfg: Config, scheme: str, architecture: str, names: Collection[str]) -> dict[str, str]:
    if scheme == "gguf":
        table = dict(_GGUF)
        if architecture == "gpt-oss":
            table["mlp_norm"] = table["attn_post_norm"]
        if architecture in ("gpt2", "gptneox") or cfg.fused_projections:
            table |= _GGUF_QKV
        if cfg.fused_projections:
            table |= {"gate": table["up"]}
        return table | (_GGUF_EXPERTS if cfg.num_experts else {})
    if architecture == "gpt2":
        return _HF_GPT2
    if architecture == "gpt_neox":
        return _HF_GPT_NEOX
    table = dict(_HF_LLAMA)
    if cfg.post_norms:
        table |= _HF_POST_NORMS
    if cfg.fused_projections:
        table |= _HF_FUSED
    if cfg.num_experts and architecture == "gpt_oss":
        table |= _HF_GPT_OSS
    elif cfg.num_experts and _HF_JOINED_EXPERTS["up"].format(i=0) in names:
        table |= _HF_JOINED_EXPERTS
    elif cfg.num_experts:
        table |= _HF_MIXTRAL if architecture == "mixtral" else _HF_EXPERTS
    return table


def _first_rows(cfg: Config, table: dict[str, str]) -> dict[str, int]:
    """Return the first row of each weight in the tensor that it shares with other weights.

    Weights with their own tensor are not in the dictionary.

    Args:
        cfg: Config of the decoder.
        table: Field of `Layer` or `Params` -> tensor name.
    """
    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    rows = {}
    if table["q"] == table["k"]:
        rows |= {"q": 0, "k": heads, "v": heads + kv_heads}
    if table.get("gate") == table["up"]:
        rows |= {"gate": 0, "up": cfg.d_ff}
    return rows


def tensor_sources(
    cfg: Config, scheme: str, *, architecture: str, names: Collection[str] = ()
) -> Params:
    """Return the tree of `Params` with a `TensorSource` at each leaf.

    Args:
        cfg: Config of the decoder.
        scheme: Naming scheme, "hf" or "gguf".
        architecture: model_type in config.json, or general.architecture in the GGUF file.
        names: Names of the tensors of a checkpoint, which tell the layout of its experts; without
            them, the layout that is written.
    """
    is_gguf = scheme == "gguf"
    table = _table(cfg, scheme, architecture, names)
    first_row = _first_rows(cfg, table)
    groups: dict[str, tuple[int, int]] = {}  # part -> stride and group
    if architecture == "gpt_neox":  # each head's query, key and value, then those of the next head
        first_row = {part: n * cfg.head_dim for n, part in enumerate("qkv")}
        groups = dict.fromkeys("qkv", (3 * cfg.head_dim, cfg.head_dim))
    elif architecture == "gpt_oss":  # the rows of gate and up alternate
        first_row, groups = {"gate": 0, "up": 1}, {"gate": (2, 1), "up": (2, 1)}
    leaf: Any = TensorSource  # takes the place of an array in the tree

    def linear(part: str, has_bias: bool, i: int = 0) -> Linear:
        name = table[part].format(i=i, e="{e}")
        is_expert = part in ("gate", "up", "down") and cfg.num_experts is not None
        has_experts = is_expert and "{e}" not in name
        suffixes = {"weight": ".weight", "bias": ".bias"}
        if has_experts and not is_gguf:
            suffixes = {"weight": "", "bias": "_bias"}
        transposed_parts = {
            "gpt2": ("q", "k", "v", "out", "up", "down"),
            "gpt_oss": ("gate", "up", "down"),
        }.get(architecture, ())

        def source(kind: str) -> Any:
            return leaf(
                name + suffixes[kind],
                first_row.get(part, 0),
                *groups.get(part, (0, 0)),
                has_experts=has_experts,
                is_transposed=part in transposed_parts and not is_gguf and kind == "weight",
                is_interleaved=architecture in _GGUF_INTERLEAVED and is_gguf and part in ("q", "k"),
            )

        return Linear(weight=source("weight"), bias=source("bias") if has_bias else None)

    def router(kind: str, i: int) -> Any:
        return leaf(f"{table['router'].format(i=i)}.{kind}") if cfg.num_experts else None

    def norm(part: str, i: int = 0) -> Norm:
        name = table[part].format(i=i)
        bias = leaf(f"{name}.bias") if cfg.norm == "layer" else None
        is_shifted = is_gguf and cfg.norm == "unit_rms"
        return Norm(scale=leaf(f"{name}.weight", is_shifted=is_shifted), bias=bias)

    def layer(i: int) -> Layer:
        mlp_bias = cfg.linear_bias
        return Layer(
            attn_norm=norm("attn_norm", i) if cfg.pre_norms else None,
            q=linear("q", cfg.qkv_bias, i),
            k=linear("k", cfg.qkv_bias, i),
            v=linear("v", cfg.qkv_bias, i),
            q_norm=norm("q_norm", i) if cfg.qk_norm else None,
            k_norm=norm("k_norm", i) if cfg.qk_norm else None,
            sinks=leaf(f"{table['sinks'].format(i=i)}") if cfg.attention_sinks else None,
            out=linear("out", cfg.linear_bias, i),
            attn_post_norm=norm("attn_post_norm", i) if cfg.post_norms else None,
            mlp_norm=norm("mlp_norm", i) if cfg.pre_norms else None,
            router=router("weight", i),
            router_bias=router("bias", i) if mlp_bias else None,
            gate=linear("gate", mlp_bias, i) if cfg.mlp in GATED_MLPS else None,
            up=linear("up", mlp_bias, i),
            down=linear("down", mlp_bias, i),
            mlp_post_norm=norm("mlp_post_norm", i) if cfg.post_norms else None,
        )

    return Params(
        embed=linear("embed", False),
        positions=leaf(f"{table['positions']}.weight") if cfg.position == "learned" else None,
        layers=tuple(layer(i) for i in range(cfg.num_layers)),
        final_norm=norm("final_norm"),
        head=None if cfg.tie_embeddings else linear("head", False),
    )


def tensors_of(
    source: TensorSource, shape: tuple[int, ...]
) -> Iterator[tuple[TensorSource, tuple[int, ...]]]:
    """Yield (source, shape) for each tensor that a weight is stored in.

    Args:
        source: Source of the weight.
        shape: Shape of the weight.

    Yields:
        The arguments if the weight is in one tensor. If each expert has its own tensor, the source
        of that tensor and the shape of one expert's weight, for each expert.
    """
    if "{e}" not in source.name:
        yield source, shape
        return
    for e in range(shape[0]):
        yield replace(source, name=source.name.replace("{e}", str(e))), shape[1:]


def rows_per_tensor(tree: Any, shapes: Any) -> dict[str, int]:
    """Return the number of rows that each tensor must have to contain its weights.

    Args:
        tree: Tree of `TensorSource`.
        shapes: The same tree with leaves that have a `.shape`.

    Returns:
        Tensor name -> number of rows, after the transposition. Of a tensor with several experts,
        the number of rows of one expert.
    """
    rows: dict[str, int] = {}
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shapes), strict=True)
    for weight, leaf in pairs:
        for source, shape in tensors_of(weight, leaf.shape):
            num_rows = shape[1] if source.has_experts else shape[0]
            rows[source.name] = rows.get(source.name, 0) + num_rows
    return rows


def rows_of(tensor: Any, source: TensorSource, count: int) -> Any:
    """Return the rows of one weight from the tensor that contains it.

    Args:
        tensor: The tensor, already transposed if it is stored transposed.
        source: Source of the weight.
        count: Number of rows of the weight.
    """
    first = source.first_row
    if not source.stride:
        return tensor[first : first + count]
    groups = tensor.reshape(-1, source.stride, *tensor.shape[1:])
    return groups[:, first : first + source.group].reshape(count, *tensor.shape[1:])


def join_rows(source: TensorSource, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Return the tensor that several weights share; the inverse of `rows_of`.

    Args:
        source: Source of one of the weights, no matter which.
        weights: The weights, in the order of their first rows.
    """
    if not source.stride:
        return np.concatenate(weights)
    groups = [weight.reshape(-1, source.group, *weight.shape[1:]) for weight in weights]
    return np.stack(groups, axis=1).reshape(-1, *weights[0].shape[1:])
