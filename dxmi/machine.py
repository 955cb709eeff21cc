"""What the operating system tells of the machine."""

import os


def available_cpus() -> int:
    """CPUs that this process may use: those of its affinity mask, or all of them where the system has none (macOS)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
