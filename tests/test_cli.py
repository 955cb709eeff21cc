"""The command line from end to end: what it prints, what it writes, and how it refuses."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from dxmi.data.description import some_of
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from support import TINY as SMALL
from support import changed, missing
from tune.cli.main import main

TINY = changed(SMALL, "train.iterations=20", "evaluate.grid=64")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, f"out={out}"]) == 0
    return out


def test_train_ends_with_the_table_and_the_paths(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *TINY, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    for words in (
        *("50 … DDPM", "5 … DDIM … trailing", "5 … before", "5 … after"),
        "fid_digits … 64",
    ):
        assert missing(words, printed) == []
    for path in (out / "curves.png", out / "samples" / "steps.png", out / "summary.json"):
        assert str(path) in printed
        assert path.exists()


def test_train_without_a_terminal_prints_plain_lines(run, tmp_path, capsys):
    main(["train", *TINY, f"out={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert re.search(r"pretrain: 60/60 iterations", printed)
    assert re.search(r"fine-tune: 20/20 iterations, fid_digits \d+\.\d\d", printed)


def test_train_again_shows_the_result_and_does_nothing(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert main(["train", *TINY, f"out={run}"]) == 0
    assert missing("finished … after", capsys.readouterr().out) == []
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def test_the_default_folder_is_named_by_experiment_and_signature(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["config", *TINY])
    signature = re.search(r"# signature (\w{12})", capsys.readouterr().out)[1]
    assert main(["train", *TINY]) == 0
    assert (tmp_path / "runs" / f"digits-{signature}" / "summary.json").exists()


def test_resume_of_a_finished_run_shows_it(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0
    assert missing("5 … after", capsys.readouterr().out) == []


def test_ctrl_c_saves_says_how_to_resume_and_the_resume_ends_the_run(run, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tune.cli.main", "train", *TINY, f"out={out}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if "fine-tune: 0/20" in line)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"dxmi train --resume {out}" in errors
    assert "Traceback" not in errors
    assert main(["train", "--resume", str(out)]) == 0
    scores = [json.loads((folder / "summary.json").read_text())["scores"] for folder in (out, run)]
    assert scores[0] == scores[1]


def test_config_prints_yaml_that_holds_every_setting(capsys):
    assert main(["config", "experiment=digits", "algorithm.entropy_coef=0.03"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["algorithm"]["entropy_coef"] == 0.03
    assert set(tree) >= {"seed", "data", "network", "pretrain", "schedule", "algorithm", "train", "evaluate"}


# ----------------------------------------------------------------------------
# data


def test_data_prints_what_it_found(capsys):
    assert main(["data", "experiment=digits"]) == 0
    printed = capsys.readouterr().out
    digits = load(DATA_SETS.config("digits"))
    pixels = digits.pixels.double()
    for words in (
        "digits … 1,797 … 8 x 8 … 1",
        f"0 … 255 … 17 … {pixels.mean():.1f} … {pixels.std(correction=0):.1f}",
        f"{(pixels == 0).double().mean():.1%} … {digits.signature}",
    ):
        assert missing(words, printed) == []
    counts = re.findall(r"^│ +(\d) +│ \1 +│ +(\d+) +│ +([\d.]+)% +│$", printed, flags=re.MULTILINE)
    assert [int(count) for _, count, _ in counts] == digits.labels.bincount().tolist()
    assert sum(float(share) for *_, share in counts) == pytest.approx(100.0, abs=0.05)


def test_data_says_what_becomes_of_the_labels(capsys):
    assert main(["data", "experiment=digits", "network.denoiser.classes=10", "data.label=3"]) == 0
    assert missing("1 … 10 … classes", capsys.readouterr().out) == []
    assert main(["data", "experiment=digits", "network.denoiser.classes=9"]) == 0
    assert missing("network.denoiser.classes is 9 … digits … labels", capsys.readouterr().out) == []
    assert main(["data", "experiment=gaussians8", "data.num_points=500"]) == 0
    printed = capsys.readouterr().out
    assert "labels" not in printed
    points = load(DATA_SETS.config("gaussians8", num_points=500)).points
    for name, column in zip("xy", points.unbind(1), strict=True):
        facts = f"{name} … {column.min():.2f} … {column.max():.2f} … {column.mean():.3f}"
        assert any(missing(facts, line) == [] for line in printed.splitlines())


@pytest.mark.parametrize("classes", ["true", "false"])
def test_data_shows_a_folder_with_what_was_left_out(tmp_path, capsys, classes):
    for name in ("[red]cats", "voegel"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGBA", (9, 9), (10, 20, 30, 0)).save(tmp_path / "images" / name / "a.png")
    (tmp_path / "images" / "voegel" / "notes.txt").write_text("")
    settings = ["data=imagenet64", f"data.folder={tmp_path / 'images'}", "data.size=8", f"data.class_folders={classes}"]
    grid = tmp_path / "grid.png"
    assert main(["data", *settings, "network=mlp_small", "--grid", str(grid)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for facts in ("images … 2", "3", "red … 255 … 1", "white … 2 … [red]cats/a.png", "1 … voegel/notes.txt"):
        assert any(missing(facts, line) == [] for line in lines), facts
    assert (missing("[red]cats", printed.replace("[red]cats/a.png", "")) == []) == (classes == "true")
    assert Image.open(grid).size[0] > 100


@pytest.mark.draws
def test_data_draws_images_and_points(tmp_path, capsys):
    for experiment in ("digits", "moons"):
        path = tmp_path / f"{experiment}.png"
        assert main(["data", f"experiment={experiment}", "--grid", str(path)]) == 0
        assert str(path) in capsys.readouterr().out
        assert len(Image.open(path).convert("RGB").getcolors(100_000)) > 16


@pytest.mark.parametrize("source", ["digits", "one digit", "folder"])
def test_the_pictures_labels_are_the_names_of_the_classes(tmp_path, monkeypatch, source):
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 9).save(tmp_path / "images" / name / "a.png")
    settings, expected = {
        "digits": (["experiment=digits"], set("0123456789")),
        "one digit": (["experiment=digits", "data.label=3"], {"3"}),
        "folder": (["data=imagenet64", f"data.folder={tmp_path / 'images'}", "data.size=8"], {"cats", "dogs"}),
    }[source]
    drawn = []
    monkeypatch.setattr("tune.cli.runs.save_labeled_grid", lambda *given: drawn.append(given))
    assert main(["data", *settings, "--grid", str(tmp_path / "grid.png")]) == 0
    ((path, pixels, labels),) = drawn
    assert path == tmp_path / "grid.png"
    assert len(pixels) == len(labels) == (2 if source == "folder" else 64)
    assert set(labels) == expected


def test_a_picture_shows_labels_with_the_frequencies_of_the_data():
    digits = load(DATA_SETS.config("digits"))
    pixels, labels = some_of(digits, 64)
    assert (len(pixels), labels.tolist()) == (64, sorted(labels.tolist()))
    whole = {image.numpy().tobytes(): int(label) for image, label in zip(digits.pixels, digits.labels, strict=True)}
    assert [whole[image.numpy().tobytes()] for image in pixels] == labels.tolist()
    assert len(some_of(load(DATA_SETS.config("moons", num_points=20)), 64)[0]) == 20


def test_sample_draws_a_grid(run, tmp_path):
    path = tmp_path / "grid.png"
    assert main(["sample", str(run), "--num", "9", "--out", str(path)]) == 0
    side = 3 * (32 + 2) + 2  # 8x8 enlarged fourfold, gaps of 2
    assert Image.open(path).size == (side, side)


def test_sample_draws_every_step(run, tmp_path):
    path = tmp_path / "grid.png"
    assert main(["sample", str(run), "--num", "3", "--steps-grid", "--out", str(path)]) == 0
    assert Image.open(path).size == (6 * 34 + 2, 3 * 34 + 2)


def test_guidance_beyond_all_numbers_draws_nothing(run, tmp_path, capsys):
    out = tmp_path / "a.png"
    for command in (["sample", str(run), "--out", str(out)], ["evaluate", str(run)]):
        assert main([*command, "--checkpoint", "last", "--guidance", "1e30"]) == 1
        assert missing("guidance … 1e+30", capsys.readouterr().err) == []
    with pytest.raises(SystemExit) as refusal:
        main(["sample", str(run), "--guidance", "1e300"])
    assert refusal.value.code == 2
    assert not out.exists()


def test_sample_writes_arrays_that_depend_on_seed_and_guidance_alone(run, tmp_path):
    def draw(name: str, *options: str) -> np.ndarray:
        path = tmp_path / f"{name}.npz"
        assert main(["sample", str(run), "--num", "5", "--out", str(path), *options]) == 0
        return np.load(path)["images"]

    plain = draw("a")
    assert plain.shape == (5, 8, 8, 1)
    assert plain.dtype == np.uint8
    assert np.array_equal(plain, draw("b"))
    assert not np.array_equal(plain, draw("c", "--seed", "1"))
    assert not np.array_equal(plain, draw("d", "--guidance", "50"))
    steps = draw("e", "--steps-grid")
    assert steps.shape == (6, 5, 8, 8, 1)
    assert np.array_equal(steps[-1], plain)


def test_evaluate_repeats_the_numbers_of_the_summary(run, tmp_path, capsys):
    path = tmp_path / "scores.json"
    assert main(["evaluate", str(run), "--out", str(path)]) == 0
    assert json.loads(path.read_text()) == json.loads((run / "summary.json").read_text())["scores"]["best"]
    assert main(["evaluate", str(run), "--checkpoint", "last", "--num-samples", "32", "--seed", "3"]) == 0
    assert "eval/num_samples" in capsys.readouterr().out


def test_sampling_needs_no_data(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dxmi.training.build.load", lambda _: pytest.fail("data was read"))
    assert main(["sample", str(run), "--num", "1", "--out", str(tmp_path / "x.png")]) == 0


REFUSED = [
    (["train", "algorithm.tau=1"], "algorithm.tau"),
    (["train", "algorithm.policy.lr=-1"], "algorithm.policy.lr is -1.0"),
    (["train", "schedule.num_steps=0"], "schedule.num_steps is 0"),
    (["train", "experiment=digts"], "digits"),
    (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
    (["train", "--resume", "nowhere", "seed=1"], "seed=1"),
    (["train", *TINY, "out=file/run"], "cannot be written"),
    (["train", *TINY, "data=mnist8"], "train-images-idx3-ubyte … missing"),
    (["train", *TINY, "resources.device=cuda:99"], "PyTorch sees"),
    (["sample", "nowhere"], "nowhere is not a run folder"),
    (["sample", "nowhere", "--out", "grid.gif"], "--out is grid.gif … .png … .npz"),
    (["sample", "nowhere", "--out", "no/such/grid.png"], "--out is no/such/grid.png"),
    (["data", "data=mnist"], "train-images-idx3-ubyte … missing"),
    (["data", "experiment=digits", "--grid", "grid.jpg"], "--grid is grid.jpg … .png"),
    (["data", "experiment=digits", "--grid", "no/such/grid.png"], "--grid is no/such/grid.png"),
    (["evaluate", "nowhere"], "nowhere is not a run folder"),
    (["evaluate", "nowhere", "--out", "no/such/scores.json"], "--out is no/such/scores.json"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a[-2:]) for a, _ in REFUSED])
def test_bad_input_is_a_sentence_and_exit_code_2_and_writes_nothing(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DXMI_DATA", str(tmp_path / "data"))
    (tmp_path / "file").write_text("")
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert missing(sentence, errors) == []
    assert len(errors.strip().split("\n")) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: [", "YAML"),
        ("name: !!python/object/apply:os.system ['true']", "YAML"),
        ("a: &x [1]\nb: [*x, *x]", "aliases"),
        ("- 1", "holds no settings"),
        ("_target_: os.system", "_target_"),
        ("algorithm: {lr: 3}", "algorithm.lr"),
        ("name: " + "x" * 2_000_000, "bytes"),
        ("seed: 2001-99-99", "YAML"),
        ("name: " + "x" * 200, "letters, digits"),
    ],
)
def test_a_bad_config_file_is_a_sentence(text, sentence, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["sample", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert missing(sentence, capsys.readouterr().err) == []


def test_an_edited_config_is_refused_in_a_sentence(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("hidden: 16", "hidden: 8"))
    for command in (["train", "--resume"], ["sample"], ["evaluate"]):
        assert main([*command, str(copy)]) == 2
        assert missing("config.yaml … restore", capsys.readouterr().err) == []


@pytest.mark.parametrize("summary", ["{}", "[1]", "null", "rubbish"])
def test_a_damaged_summary_is_named(run, tmp_path, capsys, summary):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "summary.json").write_text(summary)
    assert main(["train", "--resume", str(copy)]) == 2
    assert missing("summary.json … damaged", capsys.readouterr().err) == []


@pytest.mark.parametrize("line", ["rubbish", "{}", "[1]"])
def test_a_damaged_row_is_named(run, tmp_path, capsys, line):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    rows = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(line + "\n" + rows)
    assert main(["train", "--resume", str(copy)]) == 2
    assert missing("metrics.jsonl … line 1", capsys.readouterr().err) == []


def test_lost_rows_do_not_lose_the_result(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    (copy / "metrics.jsonl").unlink()
    assert main(["train", "--resume", str(copy)]) == 0
    assert (copy / "summary.json").exists()


def test_links_and_files_among_the_checkpoints_are_left_alone(run, tmp_path):
    copy, outside = tmp_path / "copy", tmp_path / "outside"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    outside.mkdir()
    (copy / "checkpoints" / "step_00000098").write_text("")
    (copy / "checkpoints" / "step_00000099").symlink_to(outside)
    assert main(["train", "--resume", str(copy)]) == 0
    assert outside.exists()


def test_a_run_from_a_gpu_is_sampled_and_resumed_on_a_cpu(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("device: auto", "device: cuda:99"))
    picture = ["--out", str(tmp_path / "x.png")]
    assert main(["sample", str(copy), *picture]) == 2
    assert missing("resources.device is cuda:99 … 0 GPUs", capsys.readouterr().err) == []
    assert main(["sample", str(copy), "--device", "cpu", *picture]) == 0
    (copy / "summary.json").unlink()
    assert main(["train", "--resume", str(copy), "resources.device=cpu"]) == 0


def test_a_reader_that_leaves_does_not_stop_the_run(run, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tune.cli.main", "train", *TINY, f"out={out}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert (out / "summary.json").exists()


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0])
def test_ctrl_c_while_it_starts_is_no_traceback(tmp_path, seconds):
    command = [sys.executable, "-m", "tune.cli.main", "train", *TINY, f"out={tmp_path / 'run'}"]

    def listen() -> None:  # a shell's background job ignores Ctrl-C, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen) as process:  # noqa: PLW1509
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    # Until `main` begins, Python is still importing its own modules, and says so in its own way.
    assert "Traceback" not in errors or not re.search(r"tune/cli/main.py.*, in (main|_run)", errors)


@pytest.mark.parametrize("module", ["dxmi", "tune.machine", "tune.cli.parser", "tune.cli.config"])
def test_ctrl_c_during_any_import_of_ours_is_no_traceback(module):
    program = f"""
import sys
from tune.cli.main import main
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.exit(main(["config"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "dxmi: stopped.\n")


@pytest.mark.parametrize(
    "module", ["dxmi.errors", "tune.cli.parser", "tune.cli.runs", pytest.param("torch", marks=pytest.mark.slow)]
)
def test_a_ctrl_c_that_an_import_swallows_is_not_lost(module):
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from tune.cli.main import main
class Swallowing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
sys.meta_path.insert(0, Swallowing())
sys.exit(main(["sample", "no/such/run"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "dxmi: stopped.\n")


def test_a_signal_that_is_ignored_stays_so():
    program = (
        "import signal, sys; from tune.cli.main import main; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "code = main(['--help']); sys.exit(code or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_a_corrupt_checkpoint_is_named_and_the_other_is_sampled(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = max((copy / "checkpoints").iterdir())
    (newest / "algorithm.safetensors").write_bytes(b"rubbish")
    assert main(["sample", str(copy), "--checkpoint", "last", "--out", str(tmp_path / "x.png")]) == 0
    assert newest.name in capsys.readouterr().err
    for folder in (copy / "checkpoints").iterdir():
        (folder / "meta.json").unlink()
    assert main(["sample", str(copy), "--out", str(tmp_path / "y.png")]) == 2
    errors = capsys.readouterr().err
    assert missing(f"{copy} … checkpoint", errors) == []
    assert "Traceback" not in errors


def test_a_run_that_diverges_fails_in_a_sentence(tmp_path, capsys):
    assert main(["train", *TINY, f"out={tmp_path / 'run'}", "algorithm.critic.lr=1e30"]) == 1
    assert "diverged" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch, capsys):
    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("dxmi.persistence.checkpoint.write_synced", full)
    assert main(["train", *TINY, f"out={tmp_path / 'run'}"]) == 1
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["evaluate"], ["data"], ["config"]])
def test_help_shows_examples_and_choices(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: dxmi" in printed
    if not command:
        assert "dxmi train experiment=digits" in printed
        assert "dxmi data experiment=digits --grid" in printed
    if command in (["train"], ["data"]):
        assert "experiment=" in printed
        assert "mnist8" in printed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path, monkeypatch, capsys, number):
    """The kernel names no file when a write fails."""

    def full(descriptor: int) -> None:
        if "run" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dxmi.persistence.files.os.fsync", full)
    assert main(["train", *TINY, f"out={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"dxmi: {tmp_path / 'run'}")
    assert os.strerror(number) in said
    assert (missing("free … space", said) == []) == (number != errno.EIO)
    assert ".part" not in said
