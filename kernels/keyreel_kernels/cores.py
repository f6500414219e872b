"""How many cores this process may use."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may run on, or fewer where its cgroup has a quota of their time, rounded up.

    Args:
        root: where /proc and /sys are.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return min(affinity, max(1, math.ceil(quota))) if math.isfinite(quota) else affinity


@functools.cache  # every search asks
def cpu_quota(root: Path = Path("/")) -> float:
    """The least quota of this process's cgroups, version 1 or 2, in cores: `docker run --cpus 1.5` is 1.5; else inf.

    A group's own quota bounds all below it. In a container the path of the group may be the host's, of which only the
    root is there.
    """
    quotas = [math.inf]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            quota, *period = " ".join(_read(mount / folder / name) for name in files).split() or [""]
            if quota.isdecimal() and period:
                quotas.append(int(quota) / int(period[0]))
    return min(quotas)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
