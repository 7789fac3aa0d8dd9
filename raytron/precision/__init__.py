"""Number formats: how matrix products are computed in each."""

from raytron.precision.products import NATIVE_BF16, linear

__all__ = ["NATIVE_BF16", "linear"]
