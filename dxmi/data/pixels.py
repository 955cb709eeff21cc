"""Conversion of any image that Pillow opens to upright opaque 8-bit RGB, each mode scaled from its own range.

    1, L, P, RGB, RGBX, CMYK, YCbCr, HSV     converted by Pillow
    LA, La, PA, RGBA, RGBa, and those above
    with a transparent color                 composited on white
    I;16, I;16B, I;16L, I;16N                divided by the largest value that their bits can hold
    I                                        from PNG and Netpbm: the same, with 16 bits; otherwise refused, since the
                                             range is unknown
    F                                        0 is black and 1 is white; refused if a pixel is outside this range
    LAB and all others                       refused

Pillow itself reduces RGB and RGBA with 16 bits per color to the upper 8 bits. The first frame of an animation is used.
"""

import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TURNED = "turned upright according to EXIF"
TRANSPARENT = "transparent, composited on white"
DEEP = "more than 8 bits, scaled from their own range"
FRAMES = "several frames, only the first is used"
_WHITE = 255
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
"""Numbers of EXIF and TIFF tags."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by EXIF orientation."""
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose mode I has 16 unsigned bits."""


def to_rgb(image: Image.Image) -> tuple[Image.Image, frozenset[str]]:
    """Convert an opened image to upright opaque RGB.

    Returns:
        The image, and the conversions that were necessary, which are constants of this module.

    Raises:
        ValueError: the range of its values is unknown; the message says why.
    """
    done = {FRAMES} if _has_frames(image) else set()
    turned = _turn(image)
    image.load()  # Pillow turns a TIFF upright here
    rgb, more = _colored(image)
    turn = _turn(image)
    if turned:
        done.add(TURNED)
    return (rgb.transpose(_TURNS[turn]) if turn else rgb), frozenset(done | more)


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except (EOFError, OSError, SyntaxError, ValueError, struct.error):  # a later frame is broken
        return False


def _turn(image: Image.Image) -> int:
    """The EXIF orientation if the image is not upright, else 0."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (broken metadata are ignored; Pillow raises many types for them)
        return 0
    return orientation if orientation in _TURNS else 0


def _colored(image: Image.Image) -> tuple[Image.Image, set[str]]:
    if image.mode.startswith("I;16"):
        return _deep(image)
    if image.mode == "I":
        return _gray(_share_of_16_bits(image)), {DEEP}
    if image.mode == "F":
        return _gray(_share_of_one(image)), {DEEP}
    if image.mode == "La":  # gray, premultiplied by alpha, which Pillow converts only to LA
        image = image.convert("LA")
    if image.mode in _WITH_ALPHA or (image.mode in _PLAIN and image.has_transparency_data):
        return _opaque(image.convert("RGBA"))
    if image.mode not in _PLAIN:
        raise ValueError(f"its mode is {image.mode}, whose range is unknown here: save it as 8-bit RGB")
    return image.convert("RGB"), set()


def _opaque(rgba: Image.Image) -> tuple[Image.Image, set[str]]:
    """Composite an RGBA image on white."""
    if rgba.getchannel("A").getextrema() == (_WHITE, _WHITE):
        return rgba.convert("RGB"), set()
    white = Image.new("RGBA", rgba.size, (_WHITE,) * 4)
    return Image.alpha_composite(white, rgba).convert("RGB"), {TRANSPARENT}


def _deep(image: Image.Image) -> tuple[Image.Image, set[str]]:
    """Convert a gray image of up to 16 bits."""
    tags = getattr(image, "tag_v2", {})  # only TIFF images have them
    values, largest = np.asarray(image).astype(np.float64), 2.0 ** tags.get(_BITS, (16,))[0] - 1.0
    share = values / largest
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white
        share = 1.0 - share
    clear = image.info.get("transparency")
    if not isinstance(clear, int) or not (values == clear).any():
        return _gray(share), {DEEP}
    return _gray(np.where(values == clear, 1.0, share)), {DEEP, TRANSPARENT}


def _share_of_16_bits(image: Image.Image) -> NDArray[np.float64]:
    values = np.asarray(image).astype(np.float64)
    if image.format not in _SIXTEEN_BITS or values.min() < 0.0 or values.max() > 65535.0:
        raise ValueError(
            f"its mode is I, 32-bit integers from {values.min():.0f} to {values.max():.0f}, whose range is "
            "unknown: save it with 8 or 16 bits"
        )
    return values / 65535.0


def _share_of_one(image: Image.Image) -> NDArray[np.float64]:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its mode is F, and it holds numbers that are not finite: save it with 8 or 16 bits")
    if values.min() < 0.0 or values.max() > 1.0:
        raise ValueError(
            f"its mode is F, with numbers from {values.min():.4g} to {values.max():.4g}, where 0 is black and 1 is "
            "white: save it with 8 or 16 bits"
        )
    return values


def _gray(share: NDArray[np.float64]) -> Image.Image:
    """An RGB image from gray values [H, W] in 0..1, where 1 is white."""
    return Image.fromarray((share * _WHITE).round().clip(0.0, _WHITE).astype(np.uint8)).convert("RGB")
