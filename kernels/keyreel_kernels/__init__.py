"""Array operations of keyreel: one table, one definition each in NumPy. Knows nothing of video."""

from __future__ import annotations

from keyreel_kernels.ops import Ops, ops_for

__all__ = ["Ops", "ops_for"]
