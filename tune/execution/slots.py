"""Description of how trials share a machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slots:
    """How trials share a machine.

    Attributes:
        cpus: number of usable cores.
        gpus: number of usable GPUs; 0 if trials run on the CPU.
        threads: CPU threads of each worker.
        gpu_share: GPUs, or the fraction of a GPU, of each worker; 0 on the CPU.
        concurrent: number of trials at once.
        workers: number of workers of each trial.
    """

    cpus: int
    gpus: int
    threads: int
    gpu_share: float
    concurrent: int
    workers: int = 1

    @property
    def devices_of_a_trial(self) -> float:
        """Devices by which a trial's time is multiplied: its GPUs, or its threads on the CPU."""
        return self.workers * (self.gpu_share or float(self.threads))

    def __str__(self) -> str:
        each = f"{self.threads} of {self.cpus} CPU threads"
        if self.gpu_share:
            each += f" and {self.gpu_share:g} of {self.gpus} GPUs" if self.gpus else f" and {self.gpu_share:g} GPUs"
        if self.workers > 1:
            return f"{self.concurrent} at once, each with {self.workers} workers that have {each} each"
        return f"{self.concurrent} at once, each with {each}"
