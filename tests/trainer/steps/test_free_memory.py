"""Memory that is free on a host, within the limits of control groups."""

import pytest
import torch

from prism_fast.steps import free_memory
from prism_fast.steps.free_memory import available_bytes, free_bytes, left_in_groups


def group(folder, limit, used, cached, older=False):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if older else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'total_' if older else ''}inactive_file {cached}\nslab 7\n")


def test_a_hosts_cache_of_files_counts_as_free(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24000000 kB\nMemFree:          300000 kB\nMemAvailable:   19000000 kB\n")
    assert available_bytes(file) == 19_000_000 * 1024
    assert available_bytes(tmp_path / "none") > 1 << 20  # another system


def test_limits_of_a_group_and_of_those_above_it(tmp_path):
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/user/job\n")
    group(root / "user" / "job", "max", 900, 100)
    group(root / "user", 4000, 3000, 500)
    assert list(left_in_groups(own, root)) == [1500]
    group(root / "user" / "job", 1200, 900, 100)
    assert list(left_in_groups(own, root)) == [400, 1500]
    group(root / "user" / "job", 800, 900, 0)  # over it already
    assert min(left_in_groups(own, root)) == 0


def test_the_older_groups(tmp_path):
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("12:cpuset:/job\n4:memory:/docker/abc\n1:name=systemd:/job\n")
    group(root / "memory" / "docker" / "abc", 5000, 2000, 300, older=True)
    assert list(left_in_groups(own, root)) == [3300]


def test_in_a_container_its_own_group_is_the_top(tmp_path):
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/../../host/path\n")
    group(root, 7000, 1000, 0)
    assert 6000 in list(left_in_groups(own, root))
    own.write_text("0::/\n")
    assert list(left_in_groups(own, root)) == [6000]


@pytest.mark.parametrize("content", ["", "nonsense\n", "0::/gone\n"])
def test_no_groups_no_limit(content, tmp_path):
    (tmp_path / "own").write_text(content)
    assert list(left_in_groups(tmp_path / "own", tmp_path / "cgroup")) == []
    assert list(left_in_groups(tmp_path / "none", tmp_path)) == []


def test_the_least_of_them_is_free(tmp_path, monkeypatch):
    (tmp_path / "own").write_text("0::/job\n")
    group(tmp_path / "job", 2_000_000, 500_000, 0)
    monkeypatch.setattr(free_memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(free_memory, "GROUPS", tmp_path)
    assert free_bytes(torch.device("cpu")) == 1_500_000
