"""The number of threads: what affinity, quotas of control groups and other processes leave, and never less than one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from giantleap.models.engines.threads import CpuQuota, Processors, choose_threads, read_quotas, set_threads


@pytest.mark.parametrize(
    ("most", "found", "processes", "threads"),
    [
        (2, Processors(2), 1, 2),
        (2, Processors(2, busy=0.2), 1, 2),
        (2, Processors(2, busy=1.0), 1, 1),
        (2, Processors(2, busy=2.0), 1, 1),
        (8, Processors(8, busy=2.0), 1, 6),
        (8, Processors(8, quota=2.5), 1, 2),
        (8, Processors(8, quota=0.5), 1, 1),
        (8, Processors(8, quota=4.0, quota_used=2.0), 1, 2),
        (8, Processors(8, busy=5.0, quota=4.0), 1, 3),
        (1, Processors(8), 1, 1),
        (4, Processors(8), 1, 4),
        (8, Processors(8), 4, 2),
        (8, Processors(8), 16, 1),
    ],
)
def test_threads_are_the_free_processors(most: int, found: Processors, processes: int, threads: int) -> None:
    assert choose_threads(most, found, processes) == threads


def _write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def test_quotas_of_version_2_are_those_of_the_group_and_of_all_around_it(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "proc/cgroup": "0::/pods/pod1/main\n",
            "proc/mounts": f"cgroup2 {tmp_path}/cgroup cgroup2 rw,nosuid 0 0\ntmpfs /tmp tmpfs rw 0 0\n",
            "cgroup/cpu.stat": "usage_usec 1\n",
            "cgroup/pods/cpu.max": "400000 100000\n",
            "cgroup/pods/pod1/cpu.max": "150000 100000\n",
            "cgroup/pods/pod1/main/cpu.max": "max 100000\n",
        },
    )
    assert list(read_quotas(tmp_path / "proc")) == [
        CpuQuota(1.5, tmp_path / "cgroup/pods/pod1/cpu.stat"),
        CpuQuota(4.0, tmp_path / "cgroup/pods/cpu.stat"),
    ]


def test_quotas_of_version_1_are_read_beside_a_version_2_without_processors(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "proc/cgroup": "5:cpuset:/\n4:cpu,cpuacct:/jobs/one\n0::/\n",
            "proc/mounts": f"cgroup {tmp_path}/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
            f"cgroup2 {tmp_path}/unified cgroup2 rw 0 0\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/jobs/one/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/jobs/one/cpu.cfs_period_us": "100000\n",
            "unified/cgroup.procs": "",
        },
    )
    usage = tmp_path / "cpu,cpuacct/jobs/one/cpuacct.usage"
    assert list(read_quotas(tmp_path / "proc")) == [CpuQuota(0.5, usage)]


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_sees_its_own_group_as_the_root_is_found(tmp_path: Path, version: int) -> None:
    kind, name = ("cgroup rw,cpu", "1:cpu") if version == 1 else ("cgroup2 rw", "0:")
    _write(
        tmp_path,
        {
            "proc/cgroup": f"{name}:/docker/0123abc\n",
            "proc/mounts": f"cgroup {tmp_path}/own {kind} 0 0\n",
            "own/cpu.max": "200000 100000\n",
            "own/cpu.cfs_quota_us": "200000\n",
            "own/cpu.cfs_period_us": "100000\n",
        },
    )
    assert [quota.processors for quota in read_quotas(tmp_path / "proc")] == [2.0]


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert list(read_quotas(tmp_path)) == []


def test_the_setting_comes_first() -> None:
    assert set_threads(3) == 3 == torch.get_num_threads()
    torch.set_num_threads(1)
    assert set_threads(0) == 1 == torch.get_num_threads(), "OMP_NUM_THREADS is the most that the rule takes"


_READ = "from giantleap.models.engines.threads import read_processors; print(read_processors(0.5).busy)"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds processes to one processor")
def test_a_busy_process_is_seen_on_the_processors_of_this_one() -> None:
    processor = min(os.sched_getaffinity(0))
    loop = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{processor}])\nwhile True: pass"]
    )
    try:
        bound = f"import os; os.sched_setaffinity(0, [{processor}]); {_READ}"
        busy = float(subprocess.run([sys.executable, "-c", bound], check=True, capture_output=True, text=True).stdout)
    finally:
        loop.kill()
        loop.wait()
    assert 0.5 < busy <= 1.0
