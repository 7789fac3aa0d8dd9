"""Number formats: how matrix products are computed in each."""

from raytron.precision.products import BF16_INSTRUCTIONS, NATIVE_BF16, linear

__all__ = ["BF16_INSTRUCTIONS", "NATIVE_BF16", "linear"]
