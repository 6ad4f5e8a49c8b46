"""How many CPUs there are for this process: control groups of both versions, nested, and the order of CPUs."""

import os
from collections import Counter

import pytest

from cpu_kernels.cpus import allowed_cpus, available_cpus, cores_of, pinned_threads, quotas, spread


def write_process(tmp_path, groups, mounts):
    """A process folder with these `cgroup` lines and mounts (root, place under `tmp_path`, kind, options)."""
    (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    lines = [
        f"30 20 0:26 {root} {tmp_path / place} rw,nosuid shared:4 - {kind} cgroup {options}\n"
        for root, place, kind, options in mounts
    ]
    (tmp_path / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/root rw\n" + "".join(lines))
    return tmp_path


def limit(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in values.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


V2 = [("/", "fs", "cgroup2", "rw,nsdelegate")]
V1 = [("/", "fs/cpu", "cgroup", "rw,cpu,cpuacct"), ("/", "fs/memory", "cgroup", "rw,memory")]


def test_version_2_counts_every_ancestor(tmp_path):
    process = write_process(tmp_path, ["0::/user/job"], V2)
    limit(tmp_path / "fs" / "user" / "job", cpu_max="max 100000")
    assert quotas(process) == []
    limit(tmp_path / "fs" / "user", cpu_max="250000 100000")
    assert quotas(process) == [3]
    limit(tmp_path / "fs" / "user" / "job", cpu_max="20000 100000")
    assert quotas(process) == [1, 3]


def test_version_1_reads_the_group_of_the_cpu_controller(tmp_path):
    process = write_process(tmp_path, ["4:memory:/m", "3:cpu,cpuacct:/jobs/a", "0::/"], V1)
    limit(tmp_path / "fs" / "cpu" / "jobs" / "a", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    assert quotas(process) == []
    limit(tmp_path / "fs" / "cpu" / "jobs", cpu_cfs_quota_us=150000, cpu_cfs_period_us=100000)
    assert quotas(process) == [2]


def test_a_container_sees_its_group_as_the_mounts_root(tmp_path):
    mounts = [("/docker/1f", "fs", "cgroup2", "rw")]
    limit(tmp_path / "fs", cpu_max="400000 100000")
    limit(tmp_path / "fs" / "inner", cpu_max="100000 100000")
    assert quotas(write_process(tmp_path, ["0::/docker/1f"], mounts)) == [4]
    assert quotas(write_process(tmp_path, ["0::/docker/1f/inner"], mounts)) == [1, 4]
    assert quotas(write_process(tmp_path, ["0::/elsewhere"], mounts)) == [4]


@pytest.mark.parametrize("text", ["", "garbage", "1 2 3", "max", "100000 0"])
def test_unreadable_limits_are_no_limits(tmp_path, text):
    process = write_process(tmp_path, ["0::/"], V2)
    limit(tmp_path / "fs", cpu_max=text, cpu_cfs_quota_us=text, cpu_cfs_period_us=text)
    assert quotas(process) == []
    assert quotas(tmp_path / "missing") == []


def test_this_process():
    assert allowed_cpus() == sorted(os.sched_getaffinity(0))
    assert 1 <= available_cpus() <= len(allowed_cpus())


def test_a_smaller_mask_counts():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(before)})
        assert available_cpus() == 1
        assert pinned_threads()[max(before)] >= 1
    finally:
        os.sched_setaffinity(0, before)


def test_cores_come_from_the_topology(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{siblings}\n")
    assert cores_of([0, 1, 2, 3], tmp_path) == [[0, 2], [1], [3]]


def test_threads_spread_over_cores_first_and_over_what_others_left():
    cores = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert spread(cores, Counter()) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert spread(cores, Counter([0, 1])) == [2, 3, 6, 7, 4, 5, 0, 1]
    assert spread(cores, Counter([0, 1, 2, 3])) == [4, 5, 6, 7, 0, 1, 2, 3]
