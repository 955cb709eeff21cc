"""A link that leads nowhere ends in a sentence that names it and what it leads to."""

from pathlib import Path

import pytest

from dxmi.data.configs import ImageFolderConfig
from dxmi.data.images import cifar10, data_root, load_folder, mnist
from dxmi.errors import UserError
from dxmi.persistence.cache import cache_root
from dxmi.persistence.files import require_target
from dxmi.training.build import Experiment
from tune.cli.main import main
from tune.config.compose import compose_experiment


@pytest.fixture
def link(tmp_path):
    """A link to a folder that does not exist."""
    path = tmp_path / "link"
    path.symlink_to(tmp_path / "gone")
    return path


COMMANDS = {
    "out": ["train", "experiment=digits", "out={link}"],
    "below out": ["train", "experiment=digits", "out={link}/run"],
    "config": ["train", "--config", "{link}"],
    "resume": ["train", "--resume", "{link}"],
    "studies": ["studies", "--studies", "{link}"],
    "study": ["report", "{link}"],
    "sweep": ["sweep", "sweep={link}/x.yaml", "--dry-run"],
}


def require_named(error: UserError, link: Path) -> None:
    assert f"{link} is a link to {link.parent / 'gone'}, which does not exist" in str(error)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_the_link_and_its_target(name, link, capsys):
    assert main([part.format(link=link) for part in COMMANDS[name]]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"{link} is a link to {link.parent / 'gone'}, which does not exist" in said


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_of_images(link, relative, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(link.parent))
    with pytest.raises(UserError, match=r"data\.folder") as caught:
        load_folder(ImageFolderConfig(folder=link.name if relative else str(link), size=32))
    require_named(caught.value, link)


@pytest.mark.parametrize(("variable", "root"), [("DXMI_CACHE", cache_root), ("DXMI_DATA", data_root)])
def test_the_folders_of_variables(variable, root, link, monkeypatch):
    monkeypatch.setenv(variable, str(link / "below"))
    with pytest.raises(UserError, match=variable) as caught:
        root()
    require_named(caught.value, link)


def test_the_usual_folder_of_a_variable(link, monkeypatch):
    monkeypatch.delenv("DXMI_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(link))
    with pytest.raises(UserError) as caught:
        cache_root()
    require_named(caught.value, link)


def test_weights(link):
    config = compose_experiment(["experiment=cifar10_t4", f"pretrain.weights={link}"]).experiment
    with pytest.raises(UserError, match=r"pretrain\.weights") as caught:
        _ = Experiment(config).public_weights
    require_named(caught.value, link)


def test_a_link_in_a_circle_and_one_that_leads_somewhere(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "good").symlink_to(tmp_path)
    with pytest.raises(UserError, match="circle"):
        require_target(tmp_path / "good" / "circle", "out")
    assert require_target(tmp_path / "good" / "new", "out") == tmp_path / "good" / "new"


FILES = {
    "MNIST/raw/train-images-idx3-ubyte": mnist,
    "MNIST/raw/train-images-idx3-ubyte.gz": mnist,
    "cifar-10-batches-bin/data_batch_1.bin": cifar10,
    "cifar-10-batches-py/data_batch_1": cifar10,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_published_data(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.symlink_to(file.parent / "gone")
    with pytest.raises(UserError, match=r"A file of (MNIST|CIFAR-10) is") as caught:
        FILES[name](train=True)
    require_named(caught.value, file)
