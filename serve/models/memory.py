"""How much memory the system would still give."""

import contextlib
import os
import sys
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that can be had without pushing others out.

    Linux knows; a container may have been given less than the machine has. Elsewhere it is what is
    physically there, which is the most that could be hoped for.
    """
    with contextlib.suppress(OSError, ValueError):
        lines = (_PROC / "meminfo").read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return min(int(found.split()[1]) * 1024, _cgroup_available())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available() -> int:
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is none
        statistics = (_CGROUP / "memory.stat").read_text().split()
        # Pages of files are given back when somebody needs them.
        files = int(statistics[statistics.index("inactive_file") + 1])
        return limit - int((_CGROUP / "memory.current").read_text()) + files
    except (OSError, ValueError):
        return sys.maxsize
