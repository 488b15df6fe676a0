"""Examples to weights: a plain loop over pure steps.

Read `config.py` (what there is to choose), `task.py` (what the loop knows of a model), `step.py`
(one step, a pure function), then `loop.py`, which calls it. `optim.py`, `loss.py`, `state.py` and
`checkpoint.py` are what their names say; `recipes/` is where models come in.
"""

from training.config import TrainConfig
from training.loop import Outcome, train
from training.state import State
from training.task import Task

__all__ = ["TrainConfig", "Outcome", "State", "Task", "train"]
