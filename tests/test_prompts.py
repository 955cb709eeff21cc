"""Prompts: which class a sentence names, how often it is drawn, and what is held out."""

import pytest
import torch

from dxmi.config import build
from dxmi.data.configs import PromptsConfig
from dxmi.data.prompts import WORDS, Prompt, read_prompts
from dxmi.errors import UserError
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.run import train
from support import stating
from tune.config.compose import compose_experiment
from tune.plans.inert_settings import digests

DIGITS, FASHION = WORDS["digits"], WORDS["fashion_mnist"]


def read(words=DIGITS, **settings):
    return read_prompts(PromptsConfig(**settings), words)


@pytest.mark.parametrize(
    ("text", "words", "label"),
    [
        ("a handwritten seven", DIGITS, 7),
        ("Two!", DIGITS, 2),
        ("an ankle boot on a table", FASHION, 9),
        ("a t-shirt", FASHION, 0),
        ("a shirt", FASHION, 6),
    ],
)
def test_the_class_of_a_prompt_is_that_of_its_word(text, words, label):
    assert read(words, texts=(text,)).trained == (Prompt(text, label),)


@pytest.mark.parametrize(
    ("text", "fact"),
    [("a handwritten letter", "none"), ("a one or a seven", '"one" and "seven"'), ("nineteen", "none")],
)
def test_a_prompt_with_no_class_or_several_is_refused(text, fact):
    with pytest.raises(UserError, match=stating(f"prompts.texts … {text} … {fact} … zero, one")):
        read(texts=(text,))


def test_braces_stand_for_every_class_that_is_not_held_out():
    found = read(texts=("a {}", "a thin four"), weights=(2, 3), held_out=("a handwritten nine",))
    assert found.trained == (
        *(Prompt(f"a {word}", k, 2) for k, word in enumerate(DIGITS[:9])),
        Prompt("a thin four", 4, 3),
    )
    assert found.held_out_labels == {9}
    assert torch.bincount(found.labels, minlength=10).tolist() == [2, 2, 2, 2, 5, 2, 2, 2, 2, 0]
    assert found.counts(10).tolist() == [2, 2, 2, 2, 5, 2, 2, 2, 2, 1]


def test_a_held_out_class_must_not_be_trained_on():
    with pytest.raises(UserError, match=stating("prompts.held_out … a big nine … only knows classes")):
        read(texts=("a big nine",), held_out=("a small nine",))


def test_prompts_come_from_a_file_too(tmp_path):
    (tmp_path / "prompts.txt").write_text("# numbers\na two\n\n  a three \n")
    assert read(file=str(tmp_path / "prompts.txt")).trained == (Prompt("a two", 2), Prompt("a three", 3))
    (tmp_path / "wrong.txt").write_text("a two\nan elephant\n")
    with pytest.raises(UserError, match=stating("prompts.file … line 2 … an elephant … none")):
        read(file=str(tmp_path / "wrong.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=stating("empty.txt … no prompts")):
        read(file=str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match=stating("prompts.file … nothing.txt … No such file")):
        read(file=str(tmp_path / "nothing.txt"))


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"prompts": {"held_out": ["a nine"]}}, "prompts.held_out … texts"),
        ({"prompts": {"texts": ["a nine"], "weights": [1, 2]}}, "prompts.weights … 2 entries … texts … 1"),
        ({"prompts": {"texts": ["a nine"], "weights": [0]}}, "prompts.weights … 1..1000"),
        ({"prompts": {"texts": ["a nine"]}}, "algorithm.kind is dxmi"),
        ({"prompts": {"texts": ["a nine"]}, "algorithm": "ppo", "reward": "ink"}, "network.denoiser.classes is 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, facts):
    with pytest.raises(UserError, match=stating(facts)):
        build(ExperimentConfig, settings)


SMALL = [
    "experiment=digits_reward",
    *("pretrain.iterations=20", "train.iterations=4", "train.batch_size=40", "train.log_every=2"),
    *("network.denoiser.hidden=16", "network.energy.hidden=16", "network.value.hidden=16"),
    *("evaluate.every=2", "evaluate.num_samples=60", "evaluate.batch_size=60", "evaluate.full_reference=false"),
    *("evaluate.metrics=null", "evaluate.grid=4"),
]


def test_only_classes_of_prompts_are_drawn_with_their_weights():
    overrides = [*SMALL, 'prompts.texts=["a seven", "a two"]', "prompts.weights=[3, 1]", 'prompts.held_out=["a nine"]']
    made = Experiment(compose_experiment(overrides).experiment)
    _, state = made.build_finetuning(made.build_denoiser())
    labels = state.stream.next().condition.labels
    assert torch.bincount(labels[0], minlength=10).tolist() == [0, 0, 10, 0, 0, 0, 0, 30, 0, 0]
    assert made.class_counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 3, 0, 1]


def test_a_run_reports_the_reward_of_held_out_prompts(tmp_path):
    overrides = [*SMALL, 'prompts.texts=["a {}"]', 'prompts.held_out=["a nine"]', "reward=ink"]
    summary = train(Experiment(compose_experiment(overrides).experiment), out=tmp_path)
    assert summary is not None
    for scores in (summary.scores["best"], summary.scores["last"]):
        assert 0.0 < scores["eval/reward_held_out_prompts"] < 1.0
        assert scores["eval/reward_held_out_prompts"] != scores["eval/reward"]


def test_data_without_words_for_its_classes_has_no_prompts():
    overrides = [*SMALL, "data=gaussians8", 'prompts.texts=["a seven"]']
    with pytest.raises(UserError):
        Experiment(compose_experiment(overrides).experiment).prompts  # noqa: B018


def test_bad_prompts_are_refused_before_anything_is_written(tmp_path):
    made = Experiment(compose_experiment([*SMALL, 'prompts.texts=["a thing"]']).experiment)
    with pytest.raises(UserError, match=stating("prompts.texts … a thing")):
        train(made, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_references_are_scored_anew_for_other_prompts_and_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def before(name, *overrides):
        summary = train(Experiment(compose_experiment([*SMALL, *overrides]).experiment), out=tmp_path / name)
        assert summary is not None
        return summary.scores["shortened"]["eval/reward"]

    zero, seven, again = (
        before(f"run {k}", f'prompts.texts=["a {word}"]') for k, word in enumerate(("zero", "seven", "zero"))
    )
    assert zero != seven
    assert zero == again
    mine = ["reward=function", "reward.function=mine:bright", "resources.allow_code=true"]
    (tmp_path / "mine.py").write_text("def bright(x, labels):\n    return x.flatten(1).mean(1)\n")
    once = before("run 3", *mine)
    (tmp_path / "mine.py").write_text("def bright(x, labels):\n    return 2 * x.flatten(1).mean(1)\n")
    assert before("run 4", *mine) == pytest.approx(2.0 * once, rel=1e-5)


def test_the_labels_of_a_run_say_what_is_held_out(tmp_path):
    overrides = [*SMALL, 'prompts.texts=["a {}"]', 'prompts.held_out=["a nine"]']
    summary = train(Experiment(compose_experiment(overrides).experiment), out=tmp_path / "run")
    assert summary is not None
    assert summary.labels.endswith("held out of training: 1")
    assert "prompts" in summary.labels


def test_nothing_is_claimed_of_settings_of_a_run_with_prompts():
    config = compose_experiment([*SMALL, 'prompts.texts=["a seven"]']).experiment
    assert digests([config]) == {config.signature: None}
