"""Information about the machine from the operating system."""

import os


def available_cpus() -> int:
    """The number of CPUs in the affinity mask of this process, or of all CPUs if the system has none (macOS)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
