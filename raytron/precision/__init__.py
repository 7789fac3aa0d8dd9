"""Number formats: how matrix products are computed in each."""

from raytron.precision.products import batched, linear, native_bf16

__all__ = ["batched", "linear", "native_bf16"]
