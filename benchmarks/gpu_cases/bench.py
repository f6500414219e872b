"""What the cases share: the device and its operations, how long one may measure, the clip to decode."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases.clocks import Clock, cupy_clock, measure
from benchmarks.gpu_cases.runner import Row


@dataclass
class Bench:
    """One device, opened when a case first needs it.

    Tests put another table of operations and another clock in its place.
    """

    device: int = 0
    quick: bool = False
    video: Path | None = None  # the user's own clip
    raw_fps: float = 0.0  # of NVDEC alone, once that has been measured
    scratch: Path = Path("keyreel-benchmark")  # for what is rendered

    @cached_property
    def ops(self) -> Any:
        from keyreel_kernels import ops_for

        return ops_for(f"cuda:{self.device}")

    @cached_property
    def arrays(self) -> Any:
        return self.ops.arrays

    @cached_property
    def clock(self) -> Clock:
        return cupy_clock(self.arrays)

    def measure(self, work: Any, clock: Clock | None = None) -> Row:
        return measure(work, clock or self.clock, budget_seconds=0.3 if self.quick else 1.0)

    @cached_property
    def copy_gigabytes_per_second(self) -> float:
        """Bytes read and written by a copy within the device, the ceiling of everything that streams."""
        with self.arrays.scope():
            size = min(2 << 30, self.free_bytes() // 4)
            source = self.arrays.xp.ones(size // 4, "float32")
            target = self.arrays.xp.empty_like(source)
            row = self.measure(lambda: self.arrays.xp.copyto(target, source))
        return 2 * source.nbytes / row["ms_back_to_back"] / 1e6

    def free_bytes(self) -> int:
        """Memory of the device that is not taken, by whomever."""
        with self.arrays.scope():
            free, _ = self.arrays.xp.cuda.runtime.memGetInfo()
        return int(free)

    def free(self) -> None:
        """Gives back what the last case held."""
        gc.collect()
        if "ops" in self.__dict__ and hasattr(self.arrays, "pool"):
            self.arrays.pool.free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def lost(self) -> bool:
        """Whether the device answers no more, as after an illegal access: nothing can then be measured here."""
        torch = sys.modules.get("torch")
        try:
            if "ops" in self.__dict__:
                self.arrays.to_host(self.arrays.to_device([0]) + 1)
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - whatever it is, the device is no good
            return True
        return False
