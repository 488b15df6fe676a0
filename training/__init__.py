"""Training: from examples to weights, as a plain loop over pure steps.

Reading order: `config.py` (settings), `task.py` (the interface of a model), `step.py` (one training
step, a pure function), `loop.py` (the loop that calls it). `optim.py`, `loss.py`, `state.py` and
`checkpoint.py` have the optimizers, the next-token loss, the training state and its checkpoints.
`recipes/` trains the models of this project.
"""

from training.config import TrainConfig
from training.loop import Outcome, train
from training.state import State
from training.task import Task

__all__ = ["TrainConfig", "Outcome", "State", "Task", "train"]
