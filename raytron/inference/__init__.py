"""Text from a model: the engine protocol, the native engine, and vLLM behind the same protocol."""

from raytron.inference.loop import EngineFailed, EngineLoop, Overloaded
from raytron.inference.sample import sample
from raytron.inference.types import (
    Collector,
    Completion,
    Engine,
    Generation,
    Output,
    Request,
    SamplingParams,
    Stats,
    WeightUpdateError,
)

__all__ = [
    "Collector",
    "Completion",
    "Engine",
    "EngineFailed",
    "EngineLoop",
    "Generation",
    "Output",
    "Overloaded",
    "Request",
    "SamplingParams",
    "Stats",
    "WeightUpdateError",
    "sample",
]
