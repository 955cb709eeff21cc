"""Golden trajectories: a change that should not alter numbers does not.

`python tests/test_golden.py` writes tests/golden.json anew; do that only with a change marked [numerics] in
CHANGELOG.md. The tolerance is that of other processors' rounding over a few iterations, no more.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dxmi.config import build
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from support import step

GOLDEN = Path(__file__).with_name("golden.json")
ITERATIONS = 5
NETWORK = {"hidden": 16, "layers": 3, "embedding": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "as released": {},
    "objective": {"algorithm": {"preset": "objective", "step_cost": "sigmoid"}},
    "separate value with target": {
        "algorithm": {
            "preset": "objective",
            "value": "separate",
            "target_ema": 0.995,
            "resample_next": True,
            "all_states": True,
        }
    },
    "step schedule, radam": {
        "schedule": {"kind": "step", "shape": "quadratic"},
        "algorithm": {"policy": {"kind": "radam", "warmup": 3}},
    },
}


def trajectory(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of the first pretraining and fine-tuning iterations, on digits; configs/ has no part in it."""
    networks = dict.fromkeys(("denoiser", "energy", "value"), NETWORK)
    experiment = Experiment(build(ExperimentConfig, {"network": networks, **settings}))
    ddpm, pretraining = experiment.build_pretraining()
    rows = [step(ddpm, pretraining, i) for i in range(ITERATIONS)]
    dxmi, state = experiment.build_finetuning(ddpm.network)
    rows += [step(dxmi, state, i) for i in range(ITERATIONS)]
    return [{key: float(value) for key, value in row.items()} for row in rows]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_iterations_are_as_recorded(name):
    torch.set_num_threads(1)
    recorded = json.loads(GOLDEN.read_text())[name]
    found = trajectory(SETTINGS[name])
    assert len(found) == len(recorded)
    for row, expected in zip(found, recorded, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({name: trajectory(settings) for name, settings in SETTINGS.items()}, indent=1) + "\n")
