"""What can go wrong with a run, as exceptions that the command line turns into sentences."""


class UserError(Exception):
    """Bad input or a bad file, said in one or two sentences: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class DivergedError(Exception):
    """A metric stopped being a finite number.

    Attributes:
        step: the iteration after which it was seen.
        metric: its key.
        value: what it was.
    """

    def __init__(self, step: int, metric: str, value: float) -> None:
        super().__init__(f"Training diverged: {metric} is {value} at iteration {step}. Lower the learning rates.")
        self.step = step
        self.metric = metric
        self.value = value


class WorkersLostError(Exception):
    """The workers of a run were lost more often than `resources.max_restarts` allows.

    Attributes:
        details: tracebacks of the last ones.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(
            f"A worker of this run was lost more often than resources.max_restarts allows; the last time: {reason}"
        )
        self.details = details
