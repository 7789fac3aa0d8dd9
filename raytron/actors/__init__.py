"""Ray actors that own a model's shards: placement, rendezvous, fan-out, failure and size. They host any engine."""

from raytron.actors.devices import Devices, share
from raytron.actors.failures import Failure, WorkerError
from raytron.actors.group import ActorGroup, Calls
from raytron.actors.placement import CapacityError
from raytron.actors.ray_types import from_ray_train, result
from raytron.actors.rollout import RolloutGroup
from raytron.actors.rollout_requests import Generated, RolloutError
from raytron.actors.scoring import ScorerGroup, ScoringError
from raytron.actors.session import Session
from raytron.actors.trainer import TrainerGroup
from raytron.actors.transport import ObjectStore
from raytron.actors.weight_sync import LocalTrainer, PushReport, WeightSync

__all__ = [
    "ActorGroup",
    "Calls",
    "CapacityError",
    "Devices",
    "Failure",
    "Generated",
    "LocalTrainer",
    "ObjectStore",
    "PushReport",
    "RolloutError",
    "RolloutGroup",
    "ScorerGroup",
    "ScoringError",
    "Session",
    "TrainerGroup",
    "WeightSync",
    "WorkerError",
    "from_ray_train",
    "result",
    "share",
]
