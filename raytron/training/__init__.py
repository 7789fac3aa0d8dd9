"""Training on one rank: the engine and what it is made of."""

from raytron.training.engine import DTYPES, StepResult, TrainEngine
from raytron.training.guard import TrainingStopped
from raytron.training.schedule import learning_rate

__all__ = ["DTYPES", "StepResult", "TrainEngine", "TrainingStopped", "learning_rate"]
