"""Hyperparameters of a decoder: sizes, and the variants of each layer.

One frozen dataclass, `Config`, describes the decoders of all families. `families.py` maps the keys
of each family's files to its fields. `Config` is hashable, so `jax.jit` takes it as a static
argument and compiles one program for each distinct config. The defaults are a Llama; a field at its
default adds no operation to the program.

Not supported: layers of different sizes, dense and expert layers in one model, shared experts, and
ALiBi. A checkpoint that needs one of them is rejected with the name of the key (`config_keys.py`).
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
    "mlp": ("swiglu", "geglu", "swiglu_oai", "gelu", "gelu_erf"),
    "qk_norm_over": ("head", "projection"),
}
_FLAGS = (
    "qkv_bias",
    "linear_bias",
    "attention_sinks",
    "qk_norm",
    "pre_norms",
    "post_norms",
    "parallel_residual",
    "norm_topk_prob",
    "scale_embeddings",
    "tie_embeddings",
    "fused_projections",
)
_POSITIVE = (
    "norm_eps",
    "rope_theta",
    "local_rope_theta",
    "attention_multiplier",
    "attn_logit_softcap",
    "final_logit_softcap",
    "swiglu_limit",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
_OPTIONAL = {"local_rope_theta", "attention_multiplier", "attn_logit_softcap"}
_OPTIONAL |= {"final_logit_softcap", "swiglu_limit"}
GATED_MLPS = ("swiglu", "geglu", "swiglu_oai")  # the kinds of MLP with a gate
MAX_EXPERTS = 4096
MAX_LAYERS = 4096  # a file with more is damaged; the limit also bounds lists with an item per layer

# The fields that each type of RoPE scaling needs.
ROPE_SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("original_max_seq_len", "short_factor", "long_factor", "attention_factor"),
}


def check_size(name: str, value: Any, max_value: float = float("inf")) -> None:
    """Check that `value` is an integer from 1 to `max_value`.

    Args:
        name: Name of the value in the error message.
        value: The value to check.
        max_value: The largest valid value.

    Raises:
        ValueError: `value` is not an integer in this range.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if value > max_value:
        raise ValueError(f"{name} must be at most {max_value}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Check that `value` is a positive, finite number; raises ValueError with `name`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies for contexts longer than the pretraining context.

    `rope.frequencies` implements the types. Fields that a type does not use are None. "longrope"
    has a tuple of factors, one divisor per channel pair, instead of `factor`.

    Raises:
        ValueError: A field is out of range, missing for its type, or not used by it.
    """

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float | None = None  # ratio of the extended context to the original one
    original_max_seq_len: int | None = None  # all but linear: positions before scaling
    # llama3: frequencies with fewer rotations than this in the original context are divided by
    # `factor`; those between the two bounds are interpolated.
    low_freq_factor: float | None = None
    # llama3: frequencies with more rotations than this are not scaled.
    high_freq_factor: float | None = None
    beta_fast: float | None = None  # yarn: as high_freq_factor
    beta_slow: float | None = None  # yarn: as low_freq_factor
    attention_factor: float | None = None  # yarn, longrope: multiplies cosines and sines
    # longrope: divisors of the frequencies in sequences up to the original context
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None  # longrope: divisors in longer sequences
    truncate: bool = True  # yarn: round the two bounds outwards to whole channel pairs

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_SCALING_FIELDS:
            raise ValueError(
                f"rope_type must be one of {', '.join(ROPE_SCALING_FIELDS)}, got {self.rope_type!r}"
            )
        for name in dict.fromkeys(field for row in ROPE_SCALING_FIELDS.values() for field in row):
            value = getattr(self, name)
            if name in ROPE_SCALING_FIELDS[self.rope_type]:
                label = f"rope scaling {self.rope_type}: {name}"
                if name in ("short_factor", "long_factor"):
                    if not isinstance(value, tuple) or not value:
                        raise ValueError(f"{label} must be a tuple of numbers, got {value!r}")
                    for number in value:
                        check_positive(label, number)
                else:
                    check_positive(label, value)
            elif value is not None:
                raise ValueError(
                    f"rope scaling {self.rope_type} does not use {name}: it must be None, "
                    f"got {value!r}"
                )
        if not isinstance(self.truncate, bool) or not (self.truncate or self.rope_type == "yarn"):
            raise ValueError(
                f"rope scaling {self.rope_type}: truncate must be True, or with yarn also False, "
                f"got {self.truncate!r}"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) is not None and getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"rope scaling {self.rope_type}: {low} must be less than {high}, "
                    f"got {getattr(self, low)} and {getattr(self, high)}"
                )


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
    qk_norm: bool = False  # RMS norm of queries and keys
    qk_norm_over: Literal["head", "projection"] = "head"  # of each head, or of all heads together
    pre_norms: bool = True  # norm the inputs of attention and MLP
    post_norms: bool = False  # norm the outputs of attention and MLP, before the addition
    parallel_residual: bool = False  # attention and MLP read the same residual stream
    residual_multiplier: float = 1.0  # multiplies the outputs of attention and MLP
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0  # used when position == "rope"
    rope_scaling: RopeScaling | None = None
    # theta of the layers with a window, without rope_scaling; None: as the other layers
    local_rope_theta: float | None = None
    rotary_dim: int | None = None  # channels of each head that are rotated; None: head_dim
    # per layer, repeated over the layers: whether queries and keys are rotated
    rope_layers: tuple[bool, ...] = (True,)
    windows: tuple[int | None, ...] = (None,)  # repeated over the layers; see `window`
    query_scalar: int | None = None  # scores are divided by its square root; None: head_dim
    attention_multiplier: float | None = None  # multiplies the scores, instead of query_scalar
    attn_logit_softcap: float | None = None  # scores become cap * tanh(score / cap)
    attention_sinks: bool = False  # each head has a score for attending to no position
    final_logit_softcap: float | None = None  # logits become cap * tanh(logit / cap)
    logits_scaling: float = 1.0  # divides the logits
    # gelu is its tanh approximation; `kernels.gated_mlp` defines the kinds with a gate.
    mlp: Literal["swiglu", "geglu", "swiglu_oai", "gelu", "gelu_erf"] = "swiglu"
    swiglu_limit: float | None = None  # of swiglu_oai: largest magnitude of gate and up
    num_experts: int | None = None  # E, MLPs per layer; None: one MLP without a router
    num_experts_per_tok: int | None = None  # number of experts that the router chooses per token
    norm_topk_prob: bool = True  # the weights of the chosen experts sum to one
    qkv_bias: bool = False
    linear_bias: bool = False  # biases on the attention output, the router, and the MLP projections
    scale_embeddings: bool = False  # multiply token embeddings by the square root of d_model
    embedding_multiplier: float = 1.0  # multiplies the token embeddings
    tie_embeddings: bool = True  # the head is the embedding table
    fused_projections: bool = False  # files and adapters store q, k, v and gate, up as one tensor

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
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                check_positive(name, value)
        if self.query_scalar is not None:
            check_size("query_scalar", self.query_scalar)
        if self.query_scalar is not None and self.attention_multiplier is not None:
            raise ValueError(
                f"only one of query_scalar and attention_multiplier can be set, "
                f"got {self.query_scalar} and {self.attention_multiplier}"
            )
        if self.norm == "layer" and (self.qk_norm or self.post_norms):
            raise ValueError("qk_norm and post_norms need an RMS norm, got norm='layer'")
        if self.qk_norm_over == "projection" and not self.qk_norm:
            raise ValueError("qk_norm_over='projection' needs qk_norm=True")
        if not (self.pre_norms or self.post_norms):
            raise ValueError("pre_norms and post_norms must not both be False")
        if self.parallel_residual and (self.post_norms or not self.pre_norms):
            raise ValueError("parallel_residual needs pre_norms=True and post_norms=False")
        if (self.mlp == "swiglu_oai") != (self.swiglu_limit is not None):
            raise ValueError(
                f"swiglu_limit must be set for mlp='swiglu_oai' and None for other kinds, "
                f"got {self.swiglu_limit} and mlp={self.mlp!r}"
            )
        self._check_rotation()
        self._check_experts()
        if not isinstance(self.windows, tuple) or not self.windows:
            raise ValueError(f"windows must be a tuple that is not empty, got {self.windows!r}")
        for window in self.windows:
            if window is not None:
                check_size("windows", window)
        # Normalized, so that equal decoders have equal configs.
        for name in ("windows", "rope_layers"):
            object.__setattr__(self, name, _shortest_period(getattr(self, name), self.num_layers))

    def _check_rotation(self) -> None:
        layers = self.rope_layers
        if not (isinstance(layers, tuple) and layers and all(isinstance(x, bool) for x in layers)):
            raise ValueError(f"rope_layers must be a tuple of True and False, got {layers!r}")
        if self.rotary_dim is not None:
            check_size("rotary_dim", self.rotary_dim, self.head_dim)
            if self.rotary_dim % 2 or self.rotary_dim == self.head_dim:
                raise ValueError(
                    f"rotary_dim must be even and less than head_dim = {self.head_dim}, or None "
                    f"for all channels, got {self.rotary_dim}"
                )
        if self.position == "learned" and (self.rotary_dim is not None or not all(layers)):
            raise ValueError("rotary_dim and rope_layers need position='rope'")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "longrope":
            pairs = (self.rotary_dim or self.head_dim) // 2
            for name in ("short_factor", "long_factor"):
                if (count := len(getattr(self.rope_scaling, name))) != pairs:
                    raise ValueError(
                        f"rope scaling longrope: {name} must have {pairs} numbers, one for each "
                        f"rotated pair of channels, got {count}"
                    )

    def _check_experts(self) -> None:
        if (self.num_experts is None) != (self.num_experts_per_tok is None):
            raise ValueError(
                f"num_experts and num_experts_per_tok must both be set or both be None, "
                f"got {self.num_experts} and {self.num_experts_per_tok}"
            )
        if self.num_experts is None:
            object.__setattr__(self, "norm_topk_prob", True)  # has no effect
            return
        check_size("num_experts", self.num_experts, MAX_EXPERTS)
        check_size("num_experts_per_tok", self.num_experts_per_tok, self.num_experts)
        if self.mlp not in GATED_MLPS:
            raise ValueError(
                f"experts have a gate: mlp must be {' or '.join(GATED_MLPS)}, got {self.mlp!r}"
            )

    def has_rope(self, layer: int) -> bool:
        """Return whether queries and keys of `layer` are rotated by their positions."""
        return self.position == "rope" and self.rope_layers[layer % len(self.rope_layers)]

    def window(self, layer: int) -> int | None:
        """Return the number of positions that a query of `layer` attends to, including its own.

        None means that a query attends to all positions up to its own.
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
        """The number of weights, including all experts; tied embeddings count once."""
        d, heads, kv = (
            self.d_model,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        num_maps = 3 if self.mlp in GATED_MLPS else 2
        norm = d * (2 if self.norm == "layer" else 1)
        norms = norm * 2 * (self.pre_norms + self.post_norms)
        if self.qk_norm:
            norms += 2 * self.head_dim if self.qk_norm_over == "head" else heads + kv
        attn = d * (heads + 2 * kv) + heads * d
        mlp = d * self.d_ff * num_maps + (d + self.d_ff * (num_maps - 1)) * self.linear_bias
        if self.num_experts is not None:
            mlp = self.num_experts * (mlp + d + self.linear_bias)  # d: a row of the router
        bias = (heads + 2 * kv) * self.qkv_bias + d * self.linear_bias
        bias += self.num_heads * self.attention_sinks
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
    raise AssertionError("expected a period, because a whole sequence is its own period")
