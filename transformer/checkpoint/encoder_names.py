"""Mapping from the weights of an encoder to the named tensors of a checkpoint.

There is one table per naming scheme. A part that a family lacks is None in the tree of weights. Two
parts with one name are stored in one tensor, one after the other: queries, keys and values, or the
two halves of a gated MLP. `names.py` is the same for decoders.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformer.checkpoint.names import TensorSource
from transformer.encoder import Config, Head, Layer, Params
from transformer.weights import Linear, Norm

# Field of `Layer`, `Params` or `Head` -> tensor name without suffix. "{i}" is the layer.
_BERT = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "q": "encoder.layer.{i}.attention.self.query",
    "k": "encoder.layer.{i}.attention.self.key",
    "v": "encoder.layer.{i}.attention.self.value",
    "out": "encoder.layer.{i}.attention.output.dense",
    "attn_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "up": "encoder.layer.{i}.intermediate.dense",
    "down": "encoder.layer.{i}.output.dense",
    "mlp_norm": "encoder.layer.{i}.output.LayerNorm",
    "head_dense": "pooler.dense",
    "head_out": "classifier",
}
_ROBERTA = _BERT | {"head_dense": "classifier.dense", "head_out": "classifier.out_proj"}
_NOMIC = {
    "embed": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "embed_norm": "emb_ln",
    **dict.fromkeys("qkv", "encoder.layers.{i}.attn.Wqkv"),
    "out": "encoder.layers.{i}.attn.out_proj",
    "attn_norm": "encoder.layers.{i}.norm1",
    "gate": "encoder.layers.{i}.mlp.fc12",
    "up": "encoder.layers.{i}.mlp.fc11",
    "down": "encoder.layers.{i}.mlp.fc2",
    "mlp_norm": "encoder.layers.{i}.norm2",
}
_MODERNBERT = {
    "embed": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    **dict.fromkeys("qkv", "layers.{i}.attn.Wqkv"),
    "out": "layers.{i}.attn.Wo",
    "attn_norm": "layers.{i}.attn_norm",
    **dict.fromkeys(("gate", "up"), "layers.{i}.mlp.Wi"),
    "down": "layers.{i}.mlp.Wo",
    "mlp_norm": "layers.{i}.mlp_norm",
    "final_norm": "final_norm",
    "head_dense": "head.dense",
    "head_norm": "head.norm",
    "head_out": "classifier",
}
_GGUF = {
    "embed": "token_embd",
    "positions": "position_embd",
    "token_types": "token_types",
    "embed_norm": "token_embd_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "out": "blk.{i}.attn_output",
    "attn_norm": "blk.{i}.attn_output_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
    "mlp_norm": "blk.{i}.layer_output_norm",
    "head_dense": "cls",
    "head_norm": "cls.norm",
    "head_out": "cls.output",
}
_GGUF_FUSED = dict.fromkeys("qkv", "blk.{i}.attn_qkv")
_TABLES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "nomic_bert": _NOMIC,
    "modernbert": _MODERNBERT,
    "gguf.bert": _GGUF,
    "gguf.nomic-bert": _GGUF | _GGUF_FUSED,
    "gguf.modern-bert": _GGUF
    | _GGUF_FUSED
    | {
        "attn_norm": "blk.{i}.attn_norm",
        "gate": "blk.{i}.ffn_up",
        "mlp_norm": "blk.{i}.ffn_norm",
        "final_norm": "output_norm",
    },
}


def tensor_sources(cfg: Config, scheme: str, names: Collection[str]) -> Params:
    """Return the tree of `Params` with a `TensorSource` at each leaf.

    Args:
        cfg: Config of the encoder.
        scheme: A model_type of config.json, or "gguf." and an architecture of a GGUF file.
        names: Names of the tensors in the file, which tell whether norms have a bias.

    Returns:
        The tree. The bias of a norm that has no bias tensor has the empty name and is zero.
    """
    table = _TABLES[scheme]
    leaf: Any = TensorSource  # takes the place of an array in the tree
    is_qkv_fused, is_mlp_fused = table["q"] == table["k"], table.get("gate") == table["up"]
    first_row = {"k": cfg.d_model, "v": 2 * cfg.d_model} if is_qkv_fused else {}
    if is_mlp_fused:
        first_row["up"] = cfg.d_ff

    def linear(part: str, has_bias: bool, i: int = 0) -> Linear:
        name, row = table[part].format(i=i), first_row.get(part, 0)
        return Linear(
            weight=leaf(f"{name}.weight", row), bias=leaf(f"{name}.bias", row) if has_bias else None
        )

    def norm(part: str, i: int = 0) -> Norm:
        name = table[part].format(i=i)
        has_bias = f"{name}.bias" in names or f"{name}.weight" not in names
        return Norm(scale=leaf(f"{name}.weight"), bias=leaf(f"{name}.bias" if has_bias else ""))

    def layer(i: int) -> Layer:
        return Layer(
            q=linear("q", cfg.attention_bias, i),
            k=linear("k", cfg.attention_bias, i),
            v=linear("v", cfg.attention_bias, i),
            out=linear("out", cfg.attention_bias, i),
            attn_norm=None if cfg.pre_norm and i == 0 else norm("attn_norm", i),
            up=linear("up", cfg.mlp_bias, i),
            down=linear("down", cfg.mlp_bias, i),
            mlp_norm=norm("mlp_norm", i),
            gate=None if cfg.mlp == "gelu" else linear("gate", cfg.mlp_bias, i),
        )

    head = None
    if cfg.head is not None:
        head = Head(
            dense=linear("head_dense", cfg.head.has_bias),
            norm=norm("head_norm") if cfg.head.has_norm else None,
            out=linear("head_out", True),
        )
    return Params(
        embed=linear("embed", False),
        positions=leaf(f"{table['positions']}.weight") if cfg.position == "learned" else None,
        token_types=leaf(f"{table['token_types']}.weight") if cfg.num_types else None,
        embed_norm=norm("embed_norm"),
        layers=tuple(layer(i) for i in range(cfg.num_layers)),
        final_norm=norm("final_norm") if cfg.pre_norm else None,
        dense=tuple(
            Linear(
                weight=leaf(f"dense.{i}.weight"),
                bias=leaf(f"dense.{i}.bias") if p.has_bias else None,
            )
            for i, p in enumerate(cfg.dense)
        ),
        head=head,
    )
