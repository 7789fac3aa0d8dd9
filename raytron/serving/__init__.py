"""Models over HTTP: OpenAI's API, Megatron's, a chat page, and what is behind them."""

from raytron.serving.backend import Backend, LocalBackend, ModelCard
from raytron.serving.http import Server, run
from raytron.serving.server import create_app

__all__ = ["Backend", "LocalBackend", "ModelCard", "Server", "create_app", "run"]
