"""How many cores a process may use: affinity, and quotas of cgroups."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from keyreel.runtime import backend
from keyreel_kernels import cores
from keyreel_kernels.cores import cpu_quota, usable_cores


def machine(root: Path, groups: str, **files: str) -> Path:
    """A folder like / with /proc/self/cgroup and files of /sys/fs/cgroup; `__` stands for a slash."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a__b__cpu.max": "max 100000", "a__cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b\n", {"a__b__cpu.max": "200000 100000", "a__cpu.max": "300000 100000"}, 2.0),
        ("0::/docker/1a2b\n", {"cpu.max": "400000 100000"}, 4.0),  # the host's path, seen from a container
        (
            "3:cpuset:/\n2:cpu,cpuacct:/x\n0::/\n",
            {"cpu__x__cpu.cfs_quota_us": "250000\n", "cpu__x__cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("1:cpu:/\n", {"cpu__cpu.cfs_quota_us": "-1\n", "cpu__cpu.cfs_period_us": "100000\n"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_a_quota_of_any_group_above_counts(tmp_path: Path, groups: str, files: dict[str, str], expected: float) -> None:
    root = machine(tmp_path, groups, **files)
    assert cpu_quota(root) == expected
    mine = len(os.sched_getaffinity(0))
    assert usable_cores(root) == (mine if expected == math.inf else max(1, min(mine, math.ceil(expected))))


def test_the_model_takes_no_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYREEL_THREADS", raising=False)
    for quota, threads in ((math.inf, 0), (0.4, 1), (1.0, 1)):
        for module in (backend, cores):
            monkeypatch.setattr(module, "cpu_quota", lambda *root, quota=quota: quota)
        assert backend._threads() == threads
    monkeypatch.setenv("KEYREEL_THREADS", "3")
    assert backend._threads() == 3
    monkeypatch.setenv("KEYREEL_THREADS", "many")
    with pytest.raises(ValueError, match="KEYREEL_THREADS"):
        backend.resolve("cpu")
