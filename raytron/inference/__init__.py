"""Text from a model."""

from raytron.inference.sample import sample

__all__ = ["sample"]
