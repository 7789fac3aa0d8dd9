"""Text from a model: the engine protocol, the native engine, and vLLM behind the same protocol."""

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
    "Generation",
    "Output",
    "Request",
    "SamplingParams",
    "Stats",
    "WeightUpdateError",
    "sample",
]
