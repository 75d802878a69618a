"""Memory limits of control groups: of the process's own group and of all above it, in both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.memory import available_memory

GB = 10**9
V1_UNLIMITED = 0x7FFFFFFFFFFFF000  # what the kernel shows where no limit was set
MOUNTS = {
    "v2": "30 23 0:26 {root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",
    "v1": "35 31 0:32 {root} {point} rw,relatime - cgroup cgroup rw,memory",
    "other": "34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset",
}


def machine(root: Path, cgroup: str, *mounts: str, memory: int = 64 * GB) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemAvailable:   {memory // 1024} kB\nHugePages_Total:       0\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts]) + "\n")
    return root


def v2(folder: Path, limit: int | str, used: int = 0, inactive: int = 0, high: int | str = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("max", limit), ("high", high), ("current", used)):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile {2 * inactive}\ninactive_file {inactive}\n")


def v1(folder: Path, limit: int, used: int = 0, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    # A group's own pages, and those of the groups below it too.
    (folder / "memory.stat").write_text(f"cache 7\ninactive_file 0\ntotal_inactive_file {inactive}\n")


def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    """A batch system gives the job 16 GB and its step none of its own; 4 GB of the job's are in use."""
    root = machine(
        tmp_path, "0::/system.slice/job 7/step\n", MOUNTS["v2"].format(root="/", point=r"/sys/fs/cgroup\040x")
    )
    top = root / "sys/fs/cgroup x"
    top.mkdir(parents=True)  # the topmost group has no limit
    v2(top / "system.slice", 40 * GB, 30 * GB)
    v2(top / "system.slice/job 7", 16 * GB, 5 * GB, inactive=GB)
    v2(top / "system.slice/job 7/step", "max", 3 * GB)
    v2(top / "user.slice", GB)  # another's
    assert available_memory(root) == 10 * GB
    v2(top / "system.slice/job 7", 16 * GB, 5 * GB, inactive=GB, high=8 * GB)
    assert available_memory(root) == 4 * GB
    v2(top / "system.slice/job 7/step", 3 * GB, 3 * GB)
    assert available_memory(root) == 0


def test_version_1_is_read_where_its_memory_controller_is_mounted(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "5:cpuset:/pod\n4:cpu,memory:/pod/box\n1:name=systemd:/\n0::/\n",
        MOUNTS["other"],
        MOUNTS["v1"].format(root="/", point="/sys/fs/cgroup/memory"),
        MOUNTS["v2"].format(root="/", point="/sys/fs/cgroup/unified"),
    )
    (root / "sys/fs/cgroup/unified").mkdir(parents=True)
    group = root / "sys/fs/cgroup/memory"
    v1(group, V1_UNLIMITED, 50 * GB)
    v1(group / "pod", 20 * GB, 12 * GB, inactive=2 * GB)
    v1(group / "pod/box", V1_UNLIMITED, 12 * GB)
    v1(root / "sys/fs/cgroup/cpuset/pod", 0)  # not the memory controller's
    assert available_memory(root) == 10 * GB
    v1(group / "pod/box", 12 * GB, 11 * GB)
    assert available_memory(root) == GB


@pytest.mark.parametrize(
    ("seen", "mounted"),
    [("/pod/3f/worker", "/pod/3f"), ("/pod/3f", "/"), ("/", "/"), ("/../..", "/"), ("/pod/3f", "/pod/3f")],
)
def test_a_container_finds_its_own_group(tmp_path: Path, seen: str, mounted: str) -> None:
    """Its path may be the host's or its own, and its folder the mount point or below it."""
    root = machine(tmp_path, f"0::{seen}\n", MOUNTS["v2"].format(root=mounted, point="/sys/fs/cgroup"))
    v2(root / "sys/fs/cgroup", 8 * GB, 2 * GB)
    v2(root / "sys/fs/cgroup/worker", "max")
    assert available_memory(root) == 6 * GB


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path / "a", "", memory=3 * 1024**3)) == 3 * 1024**3
    root = machine(tmp_path / "b", "0::/x\n", MOUNTS["v2"].format(root="/", point="/sys/fs/cgroup"), memory=1024**3)
    v2(root / "sys/fs/cgroup/x", 8 * GB)  # more than there is
    assert available_memory(root) == 1024**3
    (root / "proc/self/mountinfo").unlink()
    assert available_memory(root) == 1024**3
    (root / "proc/meminfo").unlink()
    assert available_memory(root) > 0


def test_damaged_files_are_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, "nonsense\n0::/x\n", "short", MOUNTS["v2"].format(root="/", point="/sys/fs/cgroup"))
    v2(root / "sys/fs/cgroup/x", 8 * GB, 2 * GB)
    (root / "sys/fs/cgroup/x/memory.stat").write_text("inactive_file\n")
    assert available_memory(root) == 6 * GB
    (root / "sys/fs/cgroup/x/memory.current").write_text("many\n")
    assert available_memory(root) == 64 * GB // 1024 * 1024
