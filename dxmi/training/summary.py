"""What came out of a finished run: the content of summary.json."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from dxmi.errors import UserError
from dxmi.persistence.run_directory import RunDirectory


@dataclass(frozen=True)
class Summary:
    """What came out of a finished run. The field names are those of summary.json.

    `reference`, `best` and `last` hold the score `metric`, all from `num_samples` samples of noise that took no part in
    choosing the best checkpoint; `direction` says whether that score is minimized or maximized, and `directions` the
    same of every score. `scores` holds every score of each, `generations` those of the best on each draw of that noise,
    of which `scores["best"]` is the mean, `seconds_per_1000_images` the time to draw samples, `members` how many seeds
    were trained in the same program at most: `seconds` are wall seconds, the same for all of them. `scored_with` names
    the network that gave the features of the scores, with its hash and that of the data. `labels` says of which classes
    the samples were, if the network knows any, and `data_notes` what was left out of the data or changed. `inputs` are
    the signatures of the data and of `pretrain.weights` (`Experiment.inputs`). `samplers` describes each reference by
    its key: in words (label, sampler), how many network evaluations a sample takes, and its role.
    """

    name: str
    signature: str
    seed: int
    metric: str
    num_samples: int
    reference: dict[str, float]
    best: dict[str, Any]
    last: dict[str, Any]
    scores: dict[str, dict[str, float]]
    seconds_per_1000_images: dict[str, float]
    iterations: int
    num_steps: int
    seconds: dict[str, float]
    device: str
    threads: int
    git_revision: str | None
    versions: dict[str, str]
    generations: list[dict[str, float]] = field(default_factory=list)
    members: int = 1
    scored_with: dict[str, str] = field(default_factory=dict)
    labels: str = ""
    data_notes: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    direction: str = "minimize"
    directions: dict[str, str] = field(default_factory=dict)


def read_summary(run: RunDirectory, tree: Mapping[str, Any]) -> Summary:
    """The summary of a finished run from the content of its summary.json; what this version does not know is left out.

    Raises:
        UserError: the file lacks something.
    """
    required = {f.name for f in fields(Summary) if f.default is MISSING and f.default_factory is MISSING}
    if not required <= tree.keys():
        raise UserError(f"{run.summary} is damaged: delete it and train again; only the report is then computed anew.")
    return Summary(**{f.name: tree[f.name] for f in fields(Summary) if f.name in tree})
