"""The platform around dxmi: configuration, sweeps and their records, and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune.api.ablation import Ablation as Ablation
    from tune.api.sweep import Sweep as Sweep


def __getattr__(name: str) -> Any:
    """`from tune import Sweep`, which imports Ray, Optuna and MLflow, takes its seconds only where it is used."""
    if name == "Sweep":
        from tune.api.sweep import Sweep  # noqa: PLC0415

        return Sweep
    if name == "Ablation":
        from tune.api.ablation import Ablation  # noqa: PLC0415

        return Ablation
    raise AttributeError(f"module 'tune' has no attribute {name!r}")
