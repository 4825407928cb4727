"""How much memory is free for tensors: of a GPU, or of the host within the limits that this process is under."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of a control group: its limit, what it holds, and which of that its files' cache would give back; version 2, and 1.
UNIFIED = ("memory.max", "memory.current", "inactive_file")
OLDER = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min([available_bytes(MEMINFO), *left_in_groups(OWN_GROUPS, GROUPS)])


def available_bytes(meminfo: Path) -> int:
    """Of the host: what its cache of files would give back is counted, which is most of what a running host has."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def left_in_groups(own: Path, root: Path) -> Iterator[int]:
    """What the limits of this process's control groups leave, each group's and those above it; none: no limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, named = line.partition(":")
        kinds, _, path = named.partition(":")
        if kinds not in ("", "memory"):
            continue
        files, top = (OLDER, root / "memory") if kinds else (UNIFIED, root)
        folder = top / path.strip("/")
        while True:  # in a container the path may be the host's; its own group is the top then
            left = _left(folder, *files)
            if left is not None:
                yield left
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        held = int((folder / used).read_text())
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # "max"
        return None
    try:
        found = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return max(0, int(most) - held + (int(found[1]) if found else 0))
