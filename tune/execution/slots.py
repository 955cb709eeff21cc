"""How trials share a machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slots:
    """How trials share a machine.

    Attributes:
        cpus: cores that may be used.
        gpus: GPUs that may be used; 0 if trials run on the CPU.
        threads: of each worker.
        gpu_share: of each worker; 0 on the CPU.
        concurrent: trials at once.
        workers: of each trial.
    """

    cpus: int
    gpus: int
    threads: int
    gpu_share: float
    concurrent: int
    workers: int = 1

    @property
    def devices_of_a_trial(self) -> float:
        """What a trial's hours are multiplied by: its GPUs, or on the CPU its threads."""
        return self.workers * (self.gpu_share or float(self.threads))

    def __str__(self) -> str:
        each = f"{self.threads} of {self.cpus} CPU threads"
        if self.gpu_share:
            each += f" and {self.gpu_share:g} of {self.gpus} GPUs" if self.gpus else f" and {self.gpu_share:g} GPUs"
        if self.workers > 1:
            return f"{self.concurrent} at once, each with {self.workers} workers, each of them with {each}"
        return f"{self.concurrent} at once, each with {each}"
