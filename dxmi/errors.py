"""Exceptions that the command line reports as messages instead of tracebacks."""


class UserError(Exception):
    """Invalid input or an invalid file. The message says in one or two sentences what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class DivergedError(Exception):
    """A metric, a sample or a weight is not a finite number.

    Attributes:
        step: The iteration after which it was detected.
        metric: Key of the metric, or a description of what is not finite.
        value: The value that is not finite.
        message: The message for the user.
    """

    def __init__(self, step: int, metric: str, value: float, message: str = "") -> None:
        self.message = (
            message or f"Training diverged: {metric} is {value} at iteration {step}. Lower the learning rates."
        )
        super().__init__(self.message)
        self.step = step
        self.metric = metric
        self.value = value

    def __reduce__(self) -> tuple[type["DivergedError"], tuple[int, str, float, str]]:
        return DivergedError, (self.step, self.metric, self.value, self.message)

    def tree(self) -> dict[str, int | str | float]:
        """The arguments of the constructor as a JSON-compatible dictionary."""
        return {"step": self.step, "metric": self.metric, "value": self.value, "message": self.message}


class WorkersLostError(Exception):
    """The workers of a run were lost more often than `resources.max_restarts` allows.

    Attributes:
        details: Tracebacks of the last workers that were lost.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(
            f"A worker of this run was lost more often than resources.max_restarts allows; the last time: {reason}"
        )
        self.details = details
