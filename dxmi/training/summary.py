"""The result of a finished run: the content of summary.json."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from dxmi.errors import UserError
from dxmi.persistence.run_directory import RunDirectory


@dataclass(frozen=True)
class Summary:
    """The result of a finished run. The field names are those of summary.json.

    Attributes:
        name: name of the experiment.
        signature: signature of the config.
        seed: seed of the run.
        metric: key of the primary score.
        num_samples: number of samples of each score, from noise that was not used to choose the best checkpoint.
        reference: primary score of each reference, by key.
        best: primary score (`value`), step and path of the best checkpoint, and its score on the selection noise.
        last: primary score, step and path of the last checkpoint.
        scores: all scores of the references, of `best` and of `last`, by key.
        seconds_per_1000_images: seconds to draw 1,000 samples, by the keys of `scores`.
        iterations: number of iterations of the fine-tuning.
        num_steps: number of steps of the policy.
        seconds: wall seconds by phase; runs that are trained in one program all count its full time.
        device: name of the device; several names if the run was resumed on another device.
        threads: number of CPU threads.
        git_revision: revision of the code, if known.
        versions: versions of Python and of the libraries.
        generations: scores of the best checkpoint on each draw of the report noise; `scores["best"]` is their mean.
        members: maximum number of seeds that were trained in the same program.
        scored_with: network that computed the features, hash of its weights, and signature of the data.
        labels: description of the classes of the samples; empty if the network knows no classes.
        data_notes: what was omitted or changed when the data were read.
        inputs: signatures of the data and of `pretrain.weights`, see `Experiment.inputs`.
        samplers: for each reference, by key, its label, sampler, network evaluations per sample, and role.
        direction: whether `metric` is minimized or maximized.
        directions: the same for all scores, by key.
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
    """Create a summary from the content of a run's summary.json; unknown fields are ignored.

    Raises:
        UserError: a required field is missing.
    """
    required = {f.name for f in fields(Summary) if f.default is MISSING and f.default_factory is MISSING}
    if not required <= tree.keys():
        raise UserError(f"{run.summary} is damaged: delete it and train again; only the report is then recomputed.")
    return Summary(**{f.name: tree[f.name] for f in fields(Summary) if f.name in tree})
