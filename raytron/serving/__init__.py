"""Models over HTTP: OpenAI's API, Megatron's, a chat page, and what is behind them."""

from raytron.serving.backend import Backend, LocalBackend, ModelCard

__all__ = ["Backend", "LocalBackend", "ModelCard"]
