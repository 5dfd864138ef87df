"""What a machine has left of its memory."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUPS = (  # of version 2 and 1: their limit, what is used, and what of that are files that can be read again
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_bytes() -> int | None:
    """Of the host, or of the control group that this process is in; None where the system does not say."""
    found = [_meminfo()] + [_left(Path(limit), Path(usage), files) for limit, usage, files in CONTROL_GROUPS]
    return min((size for size in found if size is not None), default=None)


def _meminfo() -> int | None:
    if not MEMINFO.exists():
        return None
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _left(limit: Path, usage: Path, files: str) -> int | None:
    if not (limit.exists() and usage.exists()) or limit.read_text().strip() == "max":
        return None
    stat = usage.parent / "memory.stat"
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return max(0, int(limit.read_text()) - int(usage.read_text()) + int(counts.get(files, 0)))
