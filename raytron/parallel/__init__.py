"""Where ranks sit, how they talk, and where tensors live."""

from raytron.parallel.collectives import Axis, GaveUp, World
from raytron.parallel.layout import Layout, plan
from raytron.parallel.mesh import Mesh

__all__ = ["Axis", "GaveUp", "Layout", "Mesh", "World", "plan"]
