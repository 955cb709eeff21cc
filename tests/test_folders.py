"""Folders of images: classes, the crop, the memory map and who makes it."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dxmi.config import build
from dxmi.data.dataset import BatchStream, content_signature, labeled_signature
from dxmi.data.folders import central_square, list_images, open_folder, read_square
from dxmi.data.images import LOADERS
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.distributed import SINGLE_PROCESS
from dxmi.errors import UserError
from dxmi.seeds import generator
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.reporter import RunReporter
from dxmi.training.run import Run
from support import missing, stating
from tune.config.compose import compose_experiment


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """Two classes of three images each, in ImageNet's layout."""
    for number in range(6):
        wnid = "n01440764" if number % 2 else "n01443537"
        save(tmp_path / "imagenet" / wnid / f"{wnid}_{number}.png", noise(16, 16, number))
    (tmp_path / "imagenet" / "n01440764" / "notes.txt").write_text("no image")
    return tmp_path / "imagenet"


# ----------------------------------------------------------------------------
# Listing.


def test_class_folders_are_numbered_in_the_order_of_their_names(imagenet):
    listing = list_images(imagenet, class_folders=True)
    assert listing.classes == ("n01440764", "n01443537")
    assert listing.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert listing.files[0] == "n01440764/n01440764_1.png"
    assert len(listing.files) == 6


def test_without_classes_all_images_below_are_of_one_kind(imagenet):
    listing = list_images(imagenet, class_folders=False)
    assert (listing.classes, listing.labels.tolist()) == ((), [0] * 6)
    assert list(listing.files) == sorted(listing.files)


def test_the_fingerprint_knows_names_sizes_and_times(imagenet):
    def now(size: int = 8) -> str:
        return list_images(imagenet, class_folders=True).fingerprint(size)

    one = imagenet / "n01440764" / "n01440764_1.png"
    prints = [now(), now(size=16)]
    os.utime(one, (1.0, 1.0))
    prints.append(now())
    one.rename(one.with_name("other.png"))
    prints.append(now())
    assert len(set(prints)) == 4
    assert now() == prints[-1]


def test_an_empty_or_missing_folder_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=stating(f"{tmp_path / 'nowhere'} … missing")):
        list_images(tmp_path / "nowhere", class_folders=False)
    with pytest.raises(UserError, match=stating(f"{tmp_path} … no images")):
        list_images(tmp_path, class_folders=False)
    with pytest.raises(UserError, match=stating(f"{tmp_path} … no class folders … data.class_folders=false")):
        list_images(tmp_path, class_folders=True)
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match=stating(f"{tmp_path} … no images in class folders")):
        list_images(tmp_path, class_folders=True)


# ----------------------------------------------------------------------------
# Crop and resize.


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of two columns, then of two rows, halves rounded up each time, as Pillow filters."""
    wide = pixels.astype(int)
    narrow = (wide[:, ::2] + wide[:, 1::2] + 1) // 2
    return ((narrow[::2] + narrow[1::2] + 1) // 2).astype(np.uint8)


def test_powers_of_two_are_means_of_neighbors(tmp_path):
    save(tmp_path / "a.png", noise(32, 32))
    expected = halved(halved(noise(32, 32)))
    assert np.array_equal(read_square(tmp_path / "a.png", 8), expected.transpose(2, 0, 1))


def test_the_last_resize_is_bicubic_with_antialiasing(tmp_path):
    """PyTorch's filter, a second implementation, agrees to one gray level; its a is -0.5 with antialiasing, too."""
    save(tmp_path / "a.png", noise(20, 20))
    found = read_square(tmp_path / "a.png", 12).astype(int)
    pixels = torch.from_numpy(noise(20, 20)).permute(2, 0, 1)[None].float()
    second = torch.nn.functional.interpolate(pixels, size=(12, 12), mode="bicubic", antialias=True)
    assert np.abs(found - second[0].round().clamp(0, 255).numpy().astype(int)).max() <= 1


def test_the_square_is_the_central_one():
    """Columns that number themselves: 8 of 20 columns are the 6th to the 13th; the rows likewise."""
    columns = np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None], (8, 20, 3)).copy()
    assert np.asarray(central_square(Image.fromarray(columns), 8))[0, :, 0].tolist() == list(range(6, 14))
    rows = columns.transpose(1, 0, 2).copy()
    assert np.asarray(central_square(Image.fromarray(rows), 8))[:, 0, 0].tolist() == list(range(6, 14))


def test_gray_palette_and_transparent_images_become_rgb(tmp_path):
    gray = Image.fromarray(noise(8, 8)[:, :, 0])
    gray.save(tmp_path / "gray.png")
    gray.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.dstack([noise(8, 8), np.full((8, 8), 7, np.uint8)])).save(tmp_path / "clear.png")
    for name in ("gray", "palette", "clear"):
        assert read_square(tmp_path / f"{name}.png", 8).shape == (3, 8, 8)
    on_white = 255.0 + (noise(8, 8).astype(float) - 255.0) * 7.0 / 255.0
    assert np.abs(read_square(tmp_path / "clear.png", 8) - on_white.transpose(2, 0, 1)).max() < 1.0


@pytest.mark.parametrize("raw", [b"", b"\xff\xd8\xff not a JPEG"])
def test_a_broken_image_is_named(tmp_path, raw):
    (tmp_path / "a.jpeg").write_bytes(raw)
    with pytest.raises(UserError, match=stating("a.jpeg … read")):
        open_folder(tmp_path, 8, class_folders=False, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.u8"))
    assert not list((tmp_path / "cache").glob("*.part"))


# ----------------------------------------------------------------------------
# The map.


def test_the_map_holds_every_image_in_order_with_its_label(imagenet, tmp_path):
    mapped = open_folder(imagenet, 16, class_folders=True, cache=tmp_path / "cache")
    listing = list_images(imagenet, class_folders=True)
    squares = torch.stack([torch.from_numpy(read_square(imagenet / name, 16).copy()) for name in listing.files])
    assert torch.equal(mapped.pixels, squares)
    assert torch.equal(mapped.labels, listing.labels)
    assert (mapped.num_classes, mapped.classes) == (2, listing.classes)
    assert mapped.signature == labeled_signature(content_signature(squares), listing.labels, listing.classes)
    manifest = json.loads(next((tmp_path / "cache").glob("*.json")).read_text())
    assert manifest["classes"] == ["n01440764", "n01443537"]


def test_the_map_is_made_once_and_again_when_a_file_changes(imagenet, tmp_path):
    def opened():
        return open_folder(imagenet, 8, class_folders=True, cache=tmp_path / "cache")

    first = opened()
    (path,) = (tmp_path / "cache").glob("*.u8")
    made = path.stat().st_mtime_ns
    assert torch.equal(opened().pixels, first.pixels)
    assert path.stat().st_mtime_ns == made
    save(imagenet / "n01440764" / "n01440764_1.png", noise(16, 16, 99))
    assert opened().signature != first.signature


@pytest.mark.parametrize("damage", ["truncate", "no manifest", "half a manifest"])
def test_a_map_that_is_not_whole_is_made_again(imagenet, tmp_path, damage):
    first = open_folder(imagenet, 8, class_folders=True, cache=tmp_path / "cache").pixels.clone()
    (path,) = (tmp_path / "cache").glob("*.u8")
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no manifest":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"shape": [6, 3')
    assert torch.equal(open_folder(imagenet, 8, class_folders=True, cache=tmp_path / "cache").pixels, first)


def test_writing_to_the_tensor_leaves_the_file_as_it_is(imagenet, tmp_path):
    mapped = open_folder(imagenet, 8, class_folders=True, cache=tmp_path / "cache")
    before = mapped.pixels.clone()
    mapped.pixels.zero_()
    assert torch.equal(open_folder(imagenet, 8, class_folders=True, cache=tmp_path / "cache").pixels, before)


def _open_and_tell(folder: Path, cache: Path, queue) -> None:
    queue.put(open_folder(folder, 8, class_folders=True, cache=cache).signature)


def test_two_processes_that_ask_at_once_get_one_map(imagenet, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    askers = [context.Process(target=_open_and_tell, args=(imagenet, tmp_path / "cache", queue)) for _ in range(3)]
    for asker in askers:
        asker.start()
    signatures = {queue.get() for _ in askers}
    for asker in askers:
        asker.join()
    assert len(signatures) == 1
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 1


def test_a_cache_that_cannot_be_written_is_named(imagenet, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=stating(f"{tmp_path / 'file'} … Not a directory")):
        open_folder(imagenet, 8, class_folders=True, cache=tmp_path / "file" / "cache")


# ----------------------------------------------------------------------------
# As a data set.


def test_a_config_names_a_folder_relative_to_the_data_root(imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    config = DATA_SETS.config("image_folder", folder="imagenet", size=8, class_folders=True)
    images = load(config)
    assert images.event == (3, 8, 8)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    one = load(DATA_SETS.config("image_folder", folder="imagenet", size=8, class_folders=True, label=1))
    assert torch.equal(one.pixels, images.pixels[3:])
    plain = load(DATA_SETS.config("image_folder", folder=str(imagenet), size=8))
    assert (plain.num_classes, len(plain)) == (0, 6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "image_folder"}, "data.folder is missing"),
        ({"kind": "image_folder", "folder": "x"}, "data.size is missing"),
        ({"kind": "image_folder", "folder": "x", "size": None}, "data.size is missing"),
        ({"kind": "image_folder", "folder": "x", "size": 0}, "data.size is 0"),
        ({"kind": "image_folder", "folder": "x", "size": 8, "label": 1}, "data.label is 1 … no classes"),
        ({"kind": "image_folder", "folder": "x", "size": 8, "class_folders": True, "label": -1}, "data.label is -1"),
        ({"kind": "digits", "size": 8}, "data.size … digits"),
        ({"kind": "digits", "class_folders": True}, "data.class_folders … digits"),
        ({"kind": "cifar10", "label": 10}, "data.label is 10 … 0..9"),
        ({"kind": "cifar"}, "data.kind is 'cifar' … cifar10"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings, sentence):
    with pytest.raises(UserError, match=stating(sentence)):
        build(ExperimentConfig, {"data": settings})


def test_a_class_that_is_not_there_is_named(imagenet):
    with pytest.raises(UserError, match=stating("data.label is 7")):
        load(DATA_SETS.config("image_folder", folder=str(imagenet), size=8, class_folders=True, label=7))


def test_a_stream_reads_the_map(imagenet, tmp_path):
    mapped = open_folder(imagenet, 8, class_folders=True, cache=tmp_path / "cache")
    in_memory = mapped.pixels.clone()
    streams = [BatchStream(pixels, 4, generator(0, "order")) for pixels in (mapped.pixels, in_memory)]
    for _ in range(4):
        assert torch.equal(streams[0].next().x, streams[1].next().x)


# ----------------------------------------------------------------------------
# Identity: everything that enters a loss or a score.


@pytest.fixture
def pets(tmp_path) -> Path:
    """Six cats and six dogs."""
    for number in range(12):
        save(tmp_path / "pets" / ("cats" if number < 6 else "dogs") / f"{number:02d}.png", noise(8, 8, number))
    return tmp_path / "pets"


def signature_of(folder: Path, **changes: object) -> str:
    settings = {"kind": "image_folder", "folder": str(folder), "size": 8, "class_folders": True, **changes}
    return load(DATA_SETS.config(**settings)).signature


def test_the_same_files_in_other_classes_are_other_data(pets):
    """Moved from class to class, renamed as a class, or in another order: their pixels are the same."""
    found = [signature_of(pets)]
    for number in (4, 5):  # in the order of the paths the pixels stay as they are
        (pets / "cats" / f"{number:02d}.png").rename(pets / "dogs" / f"{number:02d}.png")
    found.append(signature_of(pets))
    pixels = load(DATA_SETS.config("image_folder", folder=str(pets), size=8, class_folders=True)).pixels
    assert pixels.shape[0] == 12
    (pets / "dogs").rename(pets / "elks")
    found.append(signature_of(pets))
    (pets / "ants").mkdir()  # shifts the numbers of all others
    found.append(signature_of(pets))
    plain = signature_of(pets, class_folders=False)
    assert len({*found, plain}) == 5
    assert signature_of(pets) == found[-1]


def test_two_files_that_change_places_are_other_data(pets):
    """Of one size and one time of writing, as an archive's are."""
    one, two = pets / "cats" / "00.bmp", pets / "dogs" / "11.bmp"
    for path in (one, two):
        save(path, noise(8, 8, len(path.parent.name) + int(path.stem)))
        os.utime(path, (1.0, 1.0))
    before = signature_of(pets)
    one.rename(pets / "third")
    two.rename(one)
    (pets / "third").rename(two)
    assert one.stat().st_size == two.stat().st_size
    assert signature_of(pets) != before


def test_the_same_pixels_with_other_labels_share_no_pretraining(pets):
    """The cached result of the one would otherwise serve the other."""
    settings = ["data=imagenet64", f"data.folder={pets}", "data.size=8", "network=mlp_small", "resources.device=cpu"]
    known = [*settings, "network.denoiser.classes=2"]
    found = [Experiment(compose_experiment(known).experiment).pretraining_signature]
    found.append(Experiment(compose_experiment([*known, "data.flip=true"]).experiment).pretraining_signature)
    (pets / "cats" / "05.png").rename(pets / "dogs" / "05.png")
    found.append(Experiment(compose_experiment(known).experiment).pretraining_signature)
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_labels_of_shipped_and_downloaded_data_are_in_their_identity_too(name, monkeypatch):
    pixels, labels = torch.arange(160, dtype=torch.uint8).view(10, 1, 4, 4), torch.arange(10)
    found = []
    for given in (labels, labels.flip(0), labels.roll(1)):
        monkeypatch.setitem(LOADERS, name, lambda *, given=given, **_: (pixels, given))
        found.append(load(DATA_SETS.config(name)).signature)
    assert len(set(found)) == 3


# ----------------------------------------------------------------------------
# What is left out, and said.

LITTER = [
    *(".ipynb_checkpoints/a.png", "__MACOSX/a.png", "lost+found/", "@eaDir/a.png", ".Trash-1000/a.png"),
    *("cats/.hidden/a.png", "cats/._00.png", "cats/Thumbs.db", "System Volume Information/a.png", ".DS_Store"),
]


def require_notes(notes: Sequence[str], *facts: str) -> None:
    """As many notes as facts, in that order."""
    for note, expected in zip(notes, facts, strict=True):
        assert missing(expected, note) == []


def test_a_link_to_the_folder_itself_is_no_class_and_one_to_another_is_counted(pets, tmp_path):
    (pets / "all").symlink_to(".")
    (pets / "above").symlink_to("..")
    shutil.copytree(pets / "cats", tmp_path / "more cats")
    (pets / "kittens").symlink_to(tmp_path / "more cats")
    listing = list_images(pets, class_folders=True)
    assert listing.classes == ("cats", "dogs", "kittens")
    assert listing.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    require_notes(listing.notes, "left out … link … above it … 2", "links … followed … 1 … kittens")


def test_hidden_and_system_folders_are_no_classes_and_their_files_no_images(pets):
    for name in LITTER:
        path = pets / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            save(path, noise(8, 8))
        elif not name.endswith("/"):
            path.write_bytes(b"x")
    listing = list_images(pets, class_folders=True)
    assert listing.classes == ("cats", "dogs")
    assert listing.labels.tolist() == [0] * 6 + [1] * 6
    require_notes(listing.notes, "left out … hidden … 10 … .DS_Store")
    assert len(list_images(pets, class_folders=False).files) == 12


def test_a_folder_of_litter_alone_is_refused_with_what_was_left_out(tmp_path):
    save(tmp_path / ".ipynb_checkpoints" / "a.png", noise(8, 8))
    with pytest.raises(UserError, match=stating("no class folders … hidden … 1 … .ipynb_checkpoints")):
        list_images(tmp_path, class_folders=True)
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(UserError, match=stating("no images … name … 1 … a.xyz")):
        list_images(tmp_path, class_folders=False)


def test_empty_classes_are_named_with_their_numbers(pets):
    for name in ("birds", "elks"):
        (pets / name).mkdir()
    listing = list_images(pets, class_folders=True)
    assert listing.classes == ("birds", "cats", "dogs", "elks")
    require_notes(listing.notes, "classes without images … 2 … birds (0) … elks (3)")
    images = load(DATA_SETS.config("image_folder", folder=str(pets), size=8, class_folders=True))
    assert images.class_counts.tolist() == [0, 6, 6, 0]


def test_every_file_is_an_image_or_counted_with_its_reason(pets):
    (pets / "cats" / "notes.txt").write_text("no image")
    (pets / "cats" / "raw.xcf").write_text("no image that we read")
    os.mkfifo(pets / "cats" / "pipe.png")  # whoever opened it would wait for ever
    (pets / "cats" / "gone.png").symlink_to("nowhere.png")
    (pets / "cats" / "up").symlink_to("..")
    (pets / "dogs" / "more").symlink_to(pets / "cats" / "kittens")
    (pets / "cats" / "kittens").mkdir()
    save(pets / "cats" / "kittens" / "k.png", noise(8, 8))
    save(pets / "top.png", noise(8, 8))
    (pets / "readme.md").write_text("")
    listing = list_images(pets, class_folders=True)
    require_notes(
        listing.notes,
        *("left out … link … above it … 1 … cats/up", "left out … link … missing … 1 … cats/gone.png"),
        *("left out … outside … class folders … 1 … top.png", "left out … not an image … name … 4 … readme.md"),
        "links … followed … 1 … dogs/more",
    )
    assert {"cats/kittens/k.png", "dogs/more/k.png"} < set(listing.files)
    assert len(listing.files) == 14


def test_what_may_not_be_read_is_counted(pets, monkeypatch):
    """As another user's; root may read everything, so that the answers of the system are played."""
    scandir, access = os.scandir, os.access

    def refusing(path):
        if str(path).endswith("dogs"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("03.png") and access(path, mode))
    listing = list_images(pets, class_folders=True)
    assert listing.labels.tolist() == [0] * 5
    require_notes(
        listing.notes,
        *("left out … file … cannot be read … 1 … cats/03.png", "left out … folder … cannot be read … 1 … dogs"),
        "classes without images … 1 … dogs (1)",
    )


@pytest.mark.parametrize("suffix", ["gif", "tif", "tiff", "pgm", "GIF", "jfif"])
def test_images_of_other_common_kinds_are_read(tmp_path, suffix):
    Image.fromarray(noise(8, 8)[:, :, 0]).save(tmp_path / f"a.{suffix}", format=None if suffix != "jfif" else "jpeg")
    assert list_images(tmp_path, class_folders=False).files == (f"a.{suffix}",)
    assert read_square(tmp_path / f"a.{suffix}", 8).shape == (3, 8, 8)


def test_files_that_hold_nothing_are_named_before_anything_is_read(pets, tmp_path):
    for name in ("02", "04"):
        (pets / "cats" / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match=stating("02.png … empty … 1 more")):
        open_folder(pets, 8, class_folders=True, cache=tmp_path / "cache")


def test_names_that_no_terminal_can_show_are_shown_otherwise(tmp_path):
    folder = os.fsencode(tmp_path / "odd")
    os.mkdir(folder)
    Image.fromarray(noise(8, 8)).save(os.fsdecode(folder) + "/a.png")
    with open(folder + b"/\xff\n.txt", "w"):
        pass
    (note,) = list_images(tmp_path / "odd", class_folders=False).notes
    assert missing("left out … not an image … name … 1 … ??.txt", note) == []


def test_a_run_says_what_was_left_out_once_and_keeps_it_in_its_summary(pets, tmp_path, monkeypatch):
    (pets / "cats" / "notes.txt").write_text("no image")
    said = []
    settings = [f"data.folder={pets}", "data.size=8", "network=mlp_small", "network.denoiser.classes=0"]
    config = compose_experiment(["data=imagenet64", *settings, "resources.device=cpu"]).experiment
    run = SimpleNamespace(config=config, reporter=RunReporter(said.append, SINGLE_PROCESS))
    Run._note(run, Experiment(config).data.notes, of_data=True)
    (event,) = said
    assert event.of_data
    assert missing("left out … not an image … name … 1 … cats/notes.txt", event.note) == []
