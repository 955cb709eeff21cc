"""Every mode that Pillow can open: scaled from its own range, upright and opaque, or refused by its name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from dxmi.data.folders import open_folder, read_square
from dxmi.data.pixels import DEEP, FRAMES, TRANSPARENT, TURNED, to_rgb
from dxmi.errors import UserError
from support import stating

SIDE = 8
RAMP = np.linspace(0.0, 1.0, SIDE * SIDE).reshape(SIDE, SIDE)
"""Shares of white."""
GRAY = (RAMP * 255).round().astype(np.uint8)
COLORS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def converted(image: Image.Image) -> np.ndarray:
    rgb, _ = to_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(int)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def opened(path: Path) -> tuple[np.ndarray, frozenset[str]]:
    with Image.open(path) as image:
        rgb, done = to_rgb(image)
    return np.asarray(rgb).astype(int), done


def gray(shares: np.ndarray) -> np.ndarray:
    """RGB from shares of white."""
    return np.repeat((shares * 255)[..., None], 3, axis=2)


# ----------------------------------------------------------------------------
# More than 8 bits.


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_16_bits_of_either_order_are_scaled_from_65535(mode):
    order = ">" if mode == "I;16B" else "<"
    raw = (RAMP * 65535).round().astype(f"{order}u2").tobytes()
    image = Image.frombytes(mode, (SIDE, SIDE), raw)
    assert np.abs(converted(image) - gray(RAMP)).max() <= 0.51
    assert to_rgb(image)[1] == {DEEP}


def test_a_16_bit_gray_png_keeps_its_mean(tmp_path):
    """The reported case: clipped, it became nearly white."""
    path = saved(tmp_path / "a.png", Image.fromarray((RAMP * 65535).round().astype(np.uint16)))
    square = read_square(path, SIDE)
    assert square.mean() == pytest.approx(127.5, abs=0.1)
    assert np.abs(square - gray(RAMP).transpose(2, 0, 1)).max() <= 0.51


def test_a_16_bit_pgm_and_a_tiff_of_12_bits_are_scaled_from_their_own_largest(tmp_path):
    words = (RAMP * 65535).round().astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + words.tobytes())
    assert np.abs(opened(tmp_path / "a.pgm")[0] - gray(RAMP)).max() <= 0.51
    small = (RAMP * 1023).round().astype(">u2")
    (tmp_path / "b.pgm").write_bytes(b"P5 8 8 1023\n" + small.tobytes())
    assert np.abs(opened(tmp_path / "b.pgm")[0] - gray(RAMP)).max() <= 0.51
    image = Image.fromarray((RAMP * 4095).round().astype(np.uint16))
    image.tag_v2 = {258: (12,)}
    assert np.abs(converted(image) - gray(RAMP)).max() <= 0.51


def test_a_16_bit_tiff_whose_zero_is_white_is_turned_round(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[262] = 0
    deep = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
    path = saved(tmp_path / "a.tif", deep, tiffinfo=info)
    with Image.open(path) as image:
        assert image.mode == "I;16"
        zero_is_white = image.tag_v2[262] == 0
    assert np.abs(opened(path)[0] - gray(1.0 - RAMP if zero_is_white else RAMP)).max() <= 0.51
    deep.tag_v2 = info
    assert np.abs(converted(deep) - gray(1.0 - RAMP)).max() <= 0.51


def png16(color_type: int, samples: np.ndarray) -> bytes:
    """A PNG of 16 bits a sample, [H, W, C], written by hand: Pillow writes none in color."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "LA"])
def test_16_bit_colors_keep_their_upper_byte(tmp_path, color_type, channels):
    samples = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, channels))
    if channels != 3:
        samples[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(png16(color_type, samples))
    expected = samples[..., :3] // 256 if channels != 2 else np.repeat(samples[..., :1] // 256, 3, axis=2)
    assert np.array_equal(opened(tmp_path / "a.png")[0], expected)


def test_floats_are_shares_of_white(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(RAMP.astype(np.float32)))
    found, done = opened(path)
    assert np.abs(found - gray(RAMP)).max() <= 0.51
    assert done == {DEEP}


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (RAMP.astype(np.float32) * 255.0, r"mode is F, with numbers from 0 to 255"),
        (RAMP.astype(np.float32) - 0.5, r"mode is F, with numbers from -0\.5 to 0\.5"),
        (np.full((SIDE, SIDE), np.nan, np.float32), "mode is F, .* not finite"),
        ((RAMP * 2**30).astype(np.int32), "mode is I, 32-bit .* 0 to 1073741824"),
    ],
    ids=["to 255", "negative", "NaN", "32 bits"],
)
def test_numbers_of_an_unknown_range_are_refused(tmp_path, pixels, sentence):
    saved(tmp_path / "a.tif", Image.fromarray(pixels))
    with pytest.raises(UserError, match=sentence) as refused:
        read_square(tmp_path / "a.tif", SIDE)
    assert str(tmp_path / "a.tif") in str(refused.value)


def test_a_mode_without_a_known_range_is_refused_by_its_name():
    with pytest.raises(ValueError, match=stating("mode … LAB")):
        to_rgb(Image.new("LAB", (SIDE, SIDE)))


# ----------------------------------------------------------------------------
# 8 bits and fewer.


def test_modes_without_alpha_are_as_pillow_converts_them(tmp_path):
    assert np.array_equal(converted(Image.fromarray(COLORS)), COLORS)
    assert np.array_equal(converted(Image.fromarray(GRAY)), np.repeat(GRAY[..., None], 3, axis=2))
    bits = Image.fromarray((GRAY > 127).astype(np.uint8) * 255).convert("1")
    assert np.array_equal(converted(bits)[..., 0], np.where(GRAY > 127, 255, 0))
    assert np.array_equal(converted(Image.fromarray(COLORS).convert("CMYK")), COLORS)
    padded = Image.frombytes("RGBX", (SIDE, SIDE), np.dstack([COLORS, ALPHA]).tobytes())
    assert np.array_equal(converted(padded), COLORS)
    for mode, error in (("YCbCr", 3), ("HSV", 8)):
        assert np.abs(converted(Image.fromarray(COLORS).convert(mode)) - COLORS).max() <= error


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return colors * share + 255.0 * (1.0 - share)


def test_transparency_is_composited_on_white():
    """A color that is hidden stays hidden."""
    rgba = Image.fromarray(np.dstack([COLORS, ALPHA]))
    gray_alpha = Image.merge("LA", (Image.fromarray(GRAY), Image.fromarray(ALPHA)))
    colors, grays = on_white(COLORS, ALPHA), on_white(np.repeat(GRAY[..., None], 3, axis=2), ALPHA)
    for image, expected, error in (
        (rgba, colors, 1.0),
        (gray_alpha, grays, 1.0),
        (rgba.convert("RGBa"), colors, 1.5),
        (gray_alpha.convert("La"), grays, 1.5),
    ):
        found, done = to_rgb(image)
        assert done == {TRANSPARENT}, image.mode
        assert np.abs(np.asarray(found).astype(int) - expected).max() <= error, image.mode


def test_palettes_with_transparency_are_composited_too(tmp_path):
    """By a color of the palette, by an alpha for each, and by a channel beside it."""
    palette = Image.fromarray(GRAY).quantize(4)
    index, clear = np.asarray(palette), int(np.asarray(palette)[0, 0])
    opaque = np.asarray(palette.convert("RGB")).astype(int)
    expected = np.where((index == clear)[..., None], 255, opaque)
    for name in ("a.gif", "a.png"):
        found, done = opened(saved(tmp_path / name, palette, transparency=clear))
        assert np.array_equal(found, expected)
        assert done == {TRANSPARENT}
    alphas = bytes(0 if number == clear else 255 for number in range(4))
    assert np.array_equal(opened(saved(tmp_path / "b.png", palette, transparency=alphas))[0], expected)
    beside = palette.convert("PA")
    beside.putalpha(Image.fromarray(np.where(index == clear, 0, 255).astype(np.uint8)))
    assert beside.mode == "PA"
    assert np.array_equal(converted(beside), expected)


def test_a_transparent_color_of_a_plain_png_becomes_white(tmp_path):
    color = tuple(int(value) for value in COLORS[0, 0])
    found, done = opened(saved(tmp_path / "a.png", Image.fromarray(COLORS), transparency=color))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(found[1:], COLORS[1:])
    assert done == {TRANSPARENT}
    words = (RAMP * 65535).round().astype(np.uint16)
    found, done = opened(saved(tmp_path / "b.png", Image.fromarray(words), transparency=int(words[0, 0])))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert np.abs(found[1:] - gray(RAMP)[1:]).max() <= 0.51
    assert done == {TRANSPARENT, DEEP}


def test_an_alpha_that_hides_nothing_is_no_transparency():
    opaque = Image.fromarray(np.dstack([COLORS, np.full((SIDE, SIDE), 255, np.uint8)]))
    found, done = to_rgb(opaque)
    assert np.array_equal(np.asarray(found), COLORS)
    assert not done


# ----------------------------------------------------------------------------
# Orientation and frames.

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}
"""From what is stored to what is seen, by the definition of each orientation in EXIF 2.3, 4.6.4."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_an_image_is_turned_upright_as_exif_says(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = COLORS[:6]
    options = {"lossless": True} if suffix == "webp" else {}
    found, done = opened(saved(tmp_path / f"a.{suffix}", Image.fromarray(stored), exif=exif, **options))
    assert np.array_equal(found, UPRIGHT[orientation](stored))
    assert done == (set() if orientation == 1 else {TURNED})


def test_broken_metadata_and_orientations_that_are_none_change_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    assert np.array_equal(opened(saved(tmp_path / "a.png", Image.fromarray(COLORS), exif=exif))[0], COLORS)
    path = saved(tmp_path / "b.png", Image.fromarray(COLORS), exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish")
    assert np.array_equal(opened(path)[0], COLORS)


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_of_several_frames_the_first_is_taken(tmp_path, suffix):
    first, second = Image.fromarray(GRAY), Image.fromarray(255 - GRAY)
    options = {"lossless": True} if suffix == "webp" else {}
    found, done = opened(saved(tmp_path / f"a.{suffix}", first, save_all=True, append_images=[second], **options))
    assert np.array_equal(found, np.repeat(GRAY[..., None], 3, axis=2))
    assert done == {FRAMES}


def test_files_that_were_changed_are_counted_with_the_first_name(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        saved(folder / f"{name}.png", Image.fromarray(np.dstack([COLORS, ALPHA])))
    saved(folder / "c.png", Image.fromarray(COLORS), exif=exif)
    expected = (f"{TRANSPARENT}: 2 (first: a.png)", f"{TURNED}: 1 (first: c.png)")
    for _ in range(2):  # made, then found
        assert open_folder(folder, SIDE, class_folders=False, cache=tmp_path / "cache").notes == expected
