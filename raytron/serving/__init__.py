"""Models over HTTP: OpenAI's API, Megatron's, a chat page, and what is behind them.

Names are loaded when they are first used: `raytron chat` and `raytron bench` talk to servers and need none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytron.serving.backend import Backend, LocalBackend, ModelCard
    from raytron.serving.http import Server, run
    from raytron.serving.server import create_app

__all__ = ["Backend", "LocalBackend", "ModelCard", "Server", "create_app", "run"]

_MODULES = {"Backend": "backend", "LocalBackend": "backend", "ModelCard": "backend"}
_MODULES |= {"Server": "http", "run": "http", "create_app": "server"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
