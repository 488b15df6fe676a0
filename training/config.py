"""The settings of a training run, except those of the model, as one frozen dataclass.

A checkpoint stores the settings as JSON, and a run resumes only with the same settings. The result
of a run depends only on `TrainConfig`, the task and the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

_CHOICES = {"schedule": ("cosine", "linear", "constant"), "optimizer": ("adamw", "muon")}
# Fields that do not change the result of a step, so a run can resume with other values of them.
MUTABLE_FIELDS = frozenset({"steps_per_epoch", "save_every", "keep"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    steps: int  # number of updates of the weights
    learning_rate: float  # the peak of the schedule
    seed: int = 0  # of the initial weights, and of random numbers in the loss such as noise

    # The learning rate rises linearly during the warm-up, then decays to a fraction of the peak.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1  # of the peak; not used by the schedule "constant"

    optimizer: Literal["adamw", "muon"] = "adamw"
    b1: float = 0.9  # decay of the first moment of AdamW, or momentum of Muon
    b2: float = 0.999  # decay of the second moment of AdamW
    eps: float = 1e-8
    weight_decay: float = 0.0  # times the learning rate; for matrices only (`optim.decay_mask`)
    clip_norm: float | None = 1.0  # maximum global norm of the gradients; None: no clipping

    micro_batches: int = 1  # parts of a batch that are computed in sequence, to save memory
    average_decay: float | None = None  # of the moving average of the weights (EMA); None: no EMA

    steps_per_epoch: int | None = None  # for "epoch" in the metrics
    validate_every: int | None = None  # steps between validations; None: only at the end
    patience: int | None = None  # validations without a better loss before stopping; None: no limit
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # number of latest checkpoints to keep

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "save_every", "keep"):
            _check_count(name, getattr(self, name))
        for name in ("steps_per_epoch", "validate_every", "patience"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("seed", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a non-negative integer, got {value!r}")
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
            raise ValueError("patience needs validate_every, got None; set both")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Return the settings from a JSON object, as written by `dataclasses.asdict`.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        names = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"the config has the unknown key {unknown[0]!r}")
        if missing := sorted(names - values.keys()):
            raise ValueError(f"the config lacks the keys {', '.join(missing)}")
        return cls(**values)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_number(
    name: str, value: Any, *, above: float | None = None, most: float = math.inf
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= most or value == above:
        bounds = "above 0" if above is not None else "at least 0"
        bounds += "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")
