"""Array operations of keyreel: one table of operations, each defined in NumPy."""

from __future__ import annotations

from keyreel_kernels.ops import Ops, ops_for

__all__ = ["Ops", "ops_for"]
