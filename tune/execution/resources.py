"""Determines how many trials this machine or the cluster can run at once."""

from collections.abc import Sequence

from dxmi.errors import UserError
from dxmi.machine import available_cpus
from dxmi.training.config import ResourcesConfig
from tune.execution.ray_runtime import cluster_nodes
from tune.execution.slots import Slots
from tune.machine import on_cluster


def find_slots(resources: ResourcesConfig, max_concurrent: int | None) -> Slots:
    """Return the slots for trials with these resources on this machine or the cluster.

    `threads: 0` means one thread per trial on the CPU, and an equal share of the cores per trial with GPUs.

    On a cluster, whose nodes may come and go, `max_concurrent` is not checked against the available devices.

    Raises:
        UserError: a trial, or the requested number of concurrent trials, needs more than is available.
    """
    if on_cluster():
        return share_cluster(resources, max_concurrent, cluster_nodes())
    import torch  # noqa: PLC0415  (needed only here)

    return share(resources, max_concurrent, available_cpus(), torch.cuda.device_count())


def share(resources: ResourcesConfig, max_concurrent: int | None, cpus: int, gpus: int) -> Slots:
    """`find_slots` for a machine with these devices."""
    if ":" in resources.device:
        raise UserError(
            f"resources.device is {resources.device}: in a sweep Ray assigns the GPUs; use cuda, auto or cpu."
        )
    if resources.device == "cuda" and not gpus:
        raise UserError("resources.device is cuda, but PyTorch sees 0 GPUs: use auto or cpu.")
    on_gpu = gpus > 0 and resources.device != "cpu"
    gpu_share = resources.gpus if on_gpu else 0.0
    workers = resources.num_workers
    if on_gpu and gpu_share * workers > gpus:
        what = f"resources.gpus is {gpu_share:g}" if workers == 1 else f"resources.num_workers is {workers}"
        raise UserError(f"{what}, but this machine has {gpus} GPUs.")
    if resources.threads > cpus:
        raise UserError(f"resources.threads is {resources.threads}, but this machine has {cpus} CPU threads.")
    if workers * (resources.threads or 1) > cpus:
        raise UserError(
            f"resources.num_workers is {workers}, and each worker needs {resources.threads or 1} CPU threads, "
            f"but this machine has {cpus}."
        )
    room = _trials_on_gpus(gpu_share * workers, gpus) if on_gpu else cpus // workers
    threads = resources.threads or (max(1, cpus // (workers * (max_concurrent or room))) if on_gpu else 1)
    room = min(room, cpus // (threads * workers))
    if max_concurrent is not None and max_concurrent > room:
        raise UserError(
            f"sweep.max_concurrent is {max_concurrent}, but this machine can run {room} trials at once: "
            f"it has {cpus} CPU threads and {gpus} GPUs, and each trial needs {threads} and {gpu_share:g}."
        )
    return Slots(cpus, gpus if on_gpu else 0, threads, gpu_share, max_concurrent or room, workers)


def _trials_on_gpus(gpu_share: float, gpus: int) -> int:
    """Return how many shares fit on the GPUs; a share below 1 is not split over two GPUs."""
    return gpus * int(1.0 / gpu_share + 1e-6) if gpu_share < 1.0 else int(gpus / gpu_share)


def share_cluster(resources: ResourcesConfig, max_concurrent: int | None, nodes: Sequence[tuple[int, int]]) -> Slots:
    """`find_slots` for a cluster whose nodes have these (CPUs, GPUs); a worker is not split over two nodes.

    Raises:
        UserError: the cluster currently has no room for a trial, and `max_concurrent` is not given.
    """
    cpus, gpus = sum(c for c, _ in nodes), sum(g for _, g in nodes)
    on_gpu = resources.device != "cpu" and (gpus > 0 or resources.device == "cuda")
    threads, gpu_share = resources.threads or 1, resources.gpus if on_gpu else 0.0
    workers = sum(_workers_on(node, threads, gpu_share) for node in nodes)
    room = workers // resources.num_workers
    if room == 0 and max_concurrent is None:
        raise UserError(
            f"The cluster has {cpus} CPUs and {gpus} GPUs on {len(nodes)} nodes, and a trial needs "
            f"{resources.num_workers} workers with {threads} CPUs and {gpu_share:g} GPUs each: use fewer, or, if nodes "
            "will be added, set sweep.max_concurrent to the number of trials to run at once."
        )
    return Slots(cpus, gpus if on_gpu else 0, threads, gpu_share, max_concurrent or room, resources.num_workers)


def _workers_on(node: tuple[int, int], threads: int, gpu_share: float) -> int:
    cpus, gpus = node
    return min(cpus // threads, _trials_on_gpus(gpu_share, gpus)) if gpu_share else cpus // threads
