"""The exact log density of samples in the plane."""

from collections.abc import Mapping

from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.data.planar import DISTRIBUTIONS
from dxmi.metrics.base import Evidence, Metric
from dxmi.metrics.configs import LogDensityConfig


class LogDensity(Metric):
    """Mean of max(log p(x), floor).

    Args:
        config: names the distribution and sets the floor.
    """

    def __init__(self, config: LogDensityConfig) -> None:
        self._distribution = DISTRIBUTIONS[config.distribution]
        self._floor = config.floor

    def observe(self, samples: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (metrics share a signature)
        """The log density of each sample, [n, 1]."""
        return self._distribution.bounded_log_density(samples, self._floor)[:, None]

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """The mean in nats."""
        return {"eval/log_density": float(evidence.rows.mean())}
