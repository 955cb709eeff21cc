"""The one exception that is meant for the user's eyes."""


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
