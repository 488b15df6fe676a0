"""What there is to choose when training, and nothing about any model.

One frozen dataclass. A checkpoint holds it as JSON, and a run goes on only with the same numbers:
what decides the weights is in `Config` or in the data, nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

_CHOICES = {"schedule": ("cosine", "linear", "constant"), "optimizer": ("adamw", "muon")}
# Fields that do not change what a step computes: a run may go on with others.
MUTABLE_FIELDS = frozenset({"steps_per_epoch", "save_every", "keep"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    steps: int  # updates of the weights
    learning_rate: float  # the highest
    seed: int = 0  # of the first weights, and of whatever a loss draws

    # The learning rate rises evenly from 0 over the warm-up, then falls to a fraction of itself.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1  # not for "constant"

    optimizer: Literal["adamw", "muon"] = "adamw"
    b1: float = 0.9  # how slowly the running mean of gradients forgets; for Muon its momentum
    b2: float = 0.999  # how slowly that of their squares does
    eps: float = 1e-8
    weight_decay: float = 0.0  # times the learning rate, of matrices; see `optim.decays`
    clip_norm: float | None = 1.0  # the most that all gradients together may measure

    micro_batches: int = 1  # a batch is read in so many parts: less memory, the same numbers
    average_decay: float | None = None  # of the running mean of weights (EMA); None: none is kept

    steps_per_epoch: int | None = None  # for "epoch" in the metrics
    validate_every: int | None = None  # steps; None: only at the end
    patience: int | None = None  # validations without a better loss before it stops; None: never
    save_every: int = 100  # steps
    keep: int = 2  # checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "save_every", "keep"):
            _check_count(name, getattr(self, name))
        for name in ("steps_per_epoch", "validate_every", "patience"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("seed", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer from 0, got {value!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(
                f"warmup_steps must be fewer than steps ({self.steps}), got {self.warmup_steps}"
            )
        for name in ("learning_rate", "eps"):
            _check_number(name, getattr(self, name), above=0.0)
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm, above=0.0)
        _check_number("weight_decay", self.weight_decay)
        _check_number("final_fraction", self.final_fraction, most=1.0)
        for name in ("b1", "b2", "average_decay"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value)
                if value >= 1:
                    raise ValueError(f"{name} must be below 1, got {value!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.patience is not None and self.validate_every is None:
            raise ValueError("patience needs validate_every, which is None")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `dataclasses.asdict`; ValueError for a key that is unknown or missing."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"config has the key {unknown[0]!r}, whose meaning is not known")
        if missing := sorted(names - values.keys()):
            raise ValueError(f"config lacks {', '.join(missing)}")
        return cls(**values)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_number(name: str, value: Any, *, above: float | None = None, most=math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= most or value == above:
        words = "positive" if above is not None else "from 0"
        words += "" if most == math.inf else f" to {most}"
        raise ValueError(f"{name} must be a finite number, {words}, got {value!r}")
