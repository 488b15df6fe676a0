"""Hyperparameters of a decoder: sizes, and the variants of each layer.

One frozen dataclass describes GPT-2, Llama, Mistral, Qwen2, Qwen3 and Gemma 3. It is hashable, so
`jax.jit` takes it as a static argument and compiles one program for each distinct config.
`families.py` maps the keys of each family's files to these fields.

Leaves out: mixtures of experts, soft caps on scores and logits, rotary embeddings of a part of each
head. A checkpoint that needs one of them is rejected with the name of the key (`config_keys.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_SIZES = (
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_model",
    "d_ff",
    "vocab_size",
    "max_seq_len",
)
_CHOICES = {
    "norm": ("rms", "unit_rms", "layer"),
    "position": ("rope", "learned"),
    "mlp": ("swiglu", "geglu", "gelu"),
}
_FLAGS = (
    "qkv_bias",
    "linear_bias",
    "qk_norm",
    "post_norms",
    "scale_embeddings",
    "tie_embeddings",
)
MAX_LAYERS = 4096  # a file that claims more is damaged; also bounds lists with one item per layer

# The fields that each type of RoPE scaling needs.
ROPE_SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
}


def check_size(name: str, value: Any, max_value: float = float("inf")) -> None:
    """Raise ValueError unless `value` is a positive integer of at most `max_value`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if value > max_value:
        raise ValueError(f"{name} must be at most {max_value}, got {value}")


def _check_positive(name: str, value: Any) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies for contexts longer than the pretraining context.

    `rope.frequencies` defines the types. Fields that a type does not use are None.

    Raises:
        ValueError: A field is out of range, missing for its type, or not used by it.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float  # ratio of the extended context to the original one
    original_max_seq_len: int | None = None  # llama3, yarn: the context before scaling
    # llama3: frequencies with fewer rotations in the original context are divided by the factor,
    low_freq_factor: float | None = None
    # and frequencies with more rotations than this stay.
    high_freq_factor: float | None = None
    beta_fast: float | None = None  # yarn: as high_freq_factor
    beta_slow: float | None = None  # yarn: as low_freq_factor
    attention_factor: float | None = None  # yarn: multiplies cosines and sines
    truncate: bool = True  # yarn: round the two bounds outwards to whole channel pairs

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_SCALING_FIELDS:
            raise ValueError(
                f"rope_type must be one of {', '.join(ROPE_SCALING_FIELDS)}, got {self.rope_type!r}"
            )
        for name in dict.fromkeys(field for row in ROPE_SCALING_FIELDS.values() for field in row):
            value = getattr(self, name)
            if name in ROPE_SCALING_FIELDS[self.rope_type]:
                _check_positive(f"rope scaling {self.rope_type}: {name}", value)
            elif value is not None:
                raise ValueError(
                    f"rope scaling {self.rope_type} does not use {name}: it must be None, "
                    f"got {value!r}"
                )
        if not isinstance(self.truncate, bool) or not (self.truncate or self.rope_type == "yarn"):
            raise ValueError(f"rope scaling {self.rope_type}: truncate must be True")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) is not None and getattr(self, low) >= getattr(self, high):
                raise ValueError(f"rope scaling {self.rope_type}: {low} must be less than {high}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Hyperparameters of a decoder-only transformer.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    num_layers: int
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key-value heads; N is a multiple of K
    head_dim: int  # H
    d_model: int  # D
    d_ff: int  # F
    vocab_size: int  # V
    max_seq_len: int  # number of positions the model was trained for
    norm: Literal["rms", "unit_rms", "layer"] = "rms"  # unit_rms: the scale is 1 + weight
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMS norm of each head's query and key
    post_norms: bool = False  # also norm the outputs of attention and MLP, before the addition
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0  # used when position == "rope"
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of layers with a window, unscaled; None: rope_theta
    windows: tuple[int | None, ...] = (None,)  # repeated over the layers; see `window`
    query_scalar: int | None = None  # scores are divided by its square root; None: head_dim
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    linear_bias: bool = False  # biases on the attention output and on both MLP projections
    scale_embeddings: bool = False  # multiply token embeddings by the square root of d_model
    tie_embeddings: bool = True  # the head is the embedding table

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_size(name, getattr(self, name))
        check_size("num_layers", self.num_layers, MAX_LAYERS)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        for name in ("norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        if self.local_rope_theta is not None:
            _check_positive("local_rope_theta", self.local_rope_theta)
        if self.query_scalar is not None:
            check_size("query_scalar", self.query_scalar)
        if self.norm == "layer" and (self.qk_norm or self.post_norms):
            raise ValueError("qk_norm and post_norms need an RMS norm, got norm='layer'")
        if not isinstance(self.windows, tuple) or not self.windows:
            raise ValueError(f"windows must be a tuple that is not empty, got {self.windows!r}")
        for window in self.windows:
            if window is not None:
                check_size("windows", window)
        # Normalized, so that equal decoders have equal configs.
        object.__setattr__(self, "windows", _shortest_period(self.windows, self.num_layers))

    def window(self, layer: int) -> int | None:
        """Return the number of positions a query of `layer` attends to, including its own.

        None means all positions up to its own.
        """
        return self.windows[layer % len(self.windows)]

    @classmethod
    def debug(cls, **changes: Any) -> Config:
        """Return a decoder of less than 50,000 weights for tests; `changes` replace its fields."""
        small: dict[str, Any] = dict(
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            d_model=32,
            d_ff=48,
            vocab_size=320,
            max_seq_len=1024,
        )
        return cls(**(small | changes))

    @property
    def num_params(self) -> int:
        """Number of weights; tied embeddings count once."""
        d, heads, kv = (
            self.d_model,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        num_maps = 2 if self.mlp == "gelu" else 3
        norm = d * (2 if self.norm == "layer" else 1)
        norms = norm * (4 if self.post_norms else 2) + 2 * self.head_dim * self.qk_norm
        attn = d * (heads + 2 * kv) + heads * d
        mlp = d * self.d_ff * num_maps
        bias = (heads + 2 * kv) * self.qkv_bias
        bias += (d + d + self.d_ff * (num_maps - 1)) * self.linear_bias
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        tables += self.max_seq_len * d * (self.position == "learned")
        return self.num_layers * (attn + mlp + bias + norms) + norm + tables


def _shortest_period(pattern: tuple, length: int) -> tuple:
    """Return the shortest tuple whose repetition begins with the `length` items of `pattern`."""
    # Two repetitions are enough: a shorter period that holds over them holds for any length.
    items = [pattern[i % len(pattern)] for i in range(min(length, 2 * len(pattern)))]
    for size in range(1, len(items) + 1):
        if all(item == items[i % size] for i, item in enumerate(items)):
            return tuple(items[:size])
    raise AssertionError("every sequence has itself as a period")
