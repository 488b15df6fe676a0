"""Fixtures of the decoder tests: tiny random decoders made by transformers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from transformer import checkpoint
from transformer.config import Config
from transformer.decoder import Params

GOLDEN = Path(__file__).parent.parent / "golden" / "transformer"
TINY = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3")
# Families whose features the families above cover too, or that only one test file needs.
MORE = (
    "gemma",
    "gemma2",
    "phi3",
    "gpt_neox",
    "olmo2",
    "granite",
    "smollm3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
)
GPT2_VARIANT = dict(
    norm="layer", position="learned", mlp="gelu", qkv_bias=True, linear_bias=True, num_kv_heads=4
)
# All variants that a Llama does not have: those of Gemma 3, and a window.
GEMMA_VARIANT = dict(
    norm="unit_rms",
    mlp="geglu",
    qk_norm=True,
    post_norms=True,
    scale_embeddings=True,
    query_scalar=10,
    local_rope_theta=100.0,
    windows=(5, None),
)
VARIANTS = {"llama": {}, "gpt2": GPT2_VARIANT, "gemma": GEMMA_VARIANT}


# Values of types that no key of a config has.
INVALID_VALUES = (
    None, True, 0, -1, 2**70, 0.5, float("nan"), float("inf"), "", "x", [], [1], ["x"], [[1]], {},
    {"x": 1}, {"rope_type": [1]}, {"full_attention": 5}, {"sliding_attention": 5},
    {"sliding_attention": {"rope_theta": "x"}}, {"type": {}}, {"rope_type": "yarn", "factor": [1]},
)  # fmt: skip


class Loaded(NamedTuple):
    """A tiny decoder, and the outputs of transformers for it, by name."""

    params: Params
    cfg: Config
    golden: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Loaded]:
    """Return a function that loads the tiny decoder of a family, once per session."""

    def load(name: str) -> Loaded:
        params, cfg, _ = checkpoint.load(GOLDEN / name)
        return Loaded(params, cfg, dict(np.load(GOLDEN / name / "golden.npz")))

    return cache(load)


def randomize(params: Params, seed: int = 0) -> Params:
    """Return the weights plus random numbers, so that no weight is neutral."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(
            leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32), leaf.dtype
        ),
        params,
    )
