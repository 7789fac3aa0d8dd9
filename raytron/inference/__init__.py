"""Text from a model: the engine protocol, the native engine, and vLLM behind the same protocol."""

from raytron.inference.engine import NativeEngine
from raytron.inference.launch import make_engine
from raytron.inference.llm import LLM
from raytron.inference.loop import EngineFailed, EngineLoop, Overloaded
from raytron.inference.scoring import Scorer
from raytron.inference.types import (
    Collector,
    Completion,
    Engine,
    Generation,
    Output,
    Pushed,
    Request,
    SamplingParams,
    Stats,
    WeightUpdateError,
)

__all__ = [
    "LLM",
    "Collector",
    "Completion",
    "Engine",
    "EngineFailed",
    "EngineLoop",
    "Generation",
    "NativeEngine",
    "Output",
    "Overloaded",
    "Pushed",
    "Request",
    "SamplingParams",
    "Scorer",
    "Stats",
    "WeightUpdateError",
    "make_engine",
]
