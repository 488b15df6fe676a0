"""openai-whisper with the weights of a Pellucid model folder, for golden files and parity tests.

Needs torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from audio import checkpoint
from transformer.checkpoint import safetensors

# Replacements that turn Hugging Face's tensor names into those of openai-whisper, in this order.
_RENAMED = (
    ("model.", ""),
    ("layers.", "blocks."),
    ("encoder_attn_layer_norm", "cross_attn_ln"),
    ("self_attn_layer_norm", "attn_ln"),
    ("encoder_attn", "cross_attn"),
    ("self_attn", "attn"),
    ("final_layer_norm", "mlp_ln"),
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("out_proj", "out"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
    ("decoder.embed_tokens", "decoder.token_embedding"),
    ("encoder.embed_positions.weight", "encoder.positional_embedding"),
    ("decoder.embed_positions.weight", "decoder.positional_embedding"),
    ("encoder.layer_norm", "encoder.ln_post"),
    ("decoder.layer_norm", "decoder.ln"),
)


def reference(folder: Path, scratch: Path):
    """Load the model in `folder` into openai-whisper, by way of a safetensors copy in `scratch`."""
    import torch
    from whisper.model import ModelDimensions, Whisper

    params, cfg = checkpoint.load(folder)
    checkpoint.save(scratch, params, cfg)
    _, tensors = safetensors.read(scratch)
    state = {}
    for name, tensor in tensors.items():
        for old, new in _RENAMED:
            name = name.replace(old, new)
        state[name] = torch.tensor(np.array(tensor.read(0, tensor.shape[0])))
    model = Whisper(
        ModelDimensions(
            n_mels=cfg.num_mels,
            n_audio_ctx=cfg.max_audio_len,
            n_audio_state=cfg.d_model,
            n_audio_head=cfg.num_heads,
            n_audio_layer=cfg.num_audio_layers,
            n_vocab=cfg.vocab_size,
            n_text_ctx=cfg.max_text_len,
            n_text_state=cfg.d_model,
            n_text_head=cfg.num_heads,
            n_text_layer=cfg.num_text_layers,
        )
    )
    model.load_state_dict(state)
    heads = torch.zeros(cfg.num_text_layers, cfg.num_heads, dtype=torch.bool)
    for layer, head in cfg.alignment_heads:
        heads[layer, head] = True
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    return model.eval()
