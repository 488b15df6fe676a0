"""Training: from examples to weights, as a plain loop over pure steps.

Read `config.py` (the settings), `task.py` (the interface of a model), `step.py` (one step, a pure
function), then `loop.py`, which calls it. `optim.py`, `loss.py`, `state.py` and `checkpoint.py`
hold what their names say. `recipes/` trains the models of this project.
"""

from training.config import TrainConfig
from training.loop import Outcome, train
from training.state import State
from training.task import Task

__all__ = ["TrainConfig", "Outcome", "State", "Task", "train"]
