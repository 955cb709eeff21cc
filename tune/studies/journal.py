"""The journal of a study: Optuna's storage in one append-only file.

Optuna is imported only when a journal is opened, since most code that handles studies does not need it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dxmi.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage


def create(journal: Path, name: str, directions: Sequence[Any]) -> "Study":
    """The study of this name, created if the journal does not contain it."""
    import optuna  # noqa: PLC0415

    return optuna.create_study(
        study_name=name, storage=_storage(journal), directions=directions, sampler=_no_sampler(), load_if_exists=True
    )


def load(journal: Path, name: str) -> "Study | None":
    """The study of this name, or None if the journal does not exist or does not contain it."""
    import optuna  # noqa: PLC0415

    if not journal.exists():
        return None
    storage = _storage(journal)
    if name not in optuna.get_all_study_names(storage):
        return None
    return optuna.load_study(study_name=name, storage=storage, sampler=_no_sampler())


def _no_sampler() -> "BaseSampler":
    """A placeholder sampler: the Optuna study never proposes trials, see `tune.search.samplers`."""
    from optuna.samplers import RandomSampler  # noqa: PLC0415

    return RandomSampler(0)


def _storage(journal: Path) -> "JournalStorage":
    import optuna  # noqa: PLC0415
    from optuna.storages import JournalStorage  # noqa: PLC0415
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs every trial, and so does this program
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))


@contextmanager
def readable(journal: Path) -> Iterator[None]:
    """Turn the errors that Optuna raises on a damaged journal into a message.

    Raises:
        UserError: the journal cannot be read.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{journal} is damaged ({type(error).__name__}): restore it from a copy, or move the study's folder away "
            "and run the sweep again; its pretraining is cached."
        ) from error


def mend(journal: Path) -> None:
    """Remove what a killed writer left behind: its lock and an incomplete last line.

    Optuna would wait 30 s for the lock, and would reject everything that is appended after an incomplete line.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    with suppress(FileNotFoundError), journal.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
