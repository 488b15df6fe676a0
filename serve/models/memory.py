"""Available memory of this machine or container."""

import contextlib
import os
import sys
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Return the bytes that can be allocated without swapping.

    On Linux it is the estimate of the kernel, or the limit of the container if that is lower. On
    other systems it is the physical memory, an upper bound.
    """
    with contextlib.suppress(OSError, ValueError):
        lines = (_PROC / "meminfo").read_text().splitlines()
        entry = next(line for line in lines if line.startswith("MemAvailable:"))
        return min(int(entry.split()[1]) * 1024, _cgroup_available())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available() -> int:
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" without a limit
        statistics = (_CGROUP / "memory.stat").read_text().split()
        # The kernel reclaims cached pages of files when a process needs memory.
        file_pages = int(statistics[statistics.index("inactive_file") + 1])
        return limit - int((_CGROUP / "memory.current").read_text()) + file_pages
    except (OSError, ValueError):
        return sys.maxsize
