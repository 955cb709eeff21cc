"""The MD5 sums of the official files of MNIST, Fashion-MNIST and CIFAR-10.

Data sets with the same layout are easily confused, so the files are verified. IDX files are compared decompressed, and
CIFAR-10's batches as rows of a label and 3,072 pixels, the format of a binary batch, to which Python batches are
converted.
"""

import hashlib
from pathlib import Path

from dxmi.errors import UserError

MNIST, FASHION_MNIST, CIFAR10 = "MNIST", "Fashion-MNIST", "CIFAR-10"
_PUBLISHED = {
    MNIST: {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    FASHION_MNIST: {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    CIFAR10: {
        "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
}
_OWNERS = {md5: (name, file) for name, files in _PUBLISHED.items() for file, md5 in files.items()}
SETTING = "data.accept_unknown_files=true"


def require_published(path: Path, content: bytes, name: str, file: str) -> None:
    """Check that a file has the content of an official file.

    Args:
        path: Path of the file.
        content: Content to compare.
        name: Name of the data set.
        file: Name of the official file.

    Raises:
        UserError: the content differs; the message names the actual file if it is a known one.
    """
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 == _PUBLISHED[name][file]:
        return
    if md5 in _OWNERS:
        whose, which = _OWNERS[md5]
        raise UserError(
            f"{path} holds {whose}'s {which}, not {name}'s {file}: put each data set into its own folder, or accept "
            f"the file with {SETTING}."
        )
    raise UserError(
        f"{path} is not {name}'s {file} as published (MD5 {md5}, not {_PUBLISHED[name][file]}): fetch it again, or "
        f"accept it with {SETTING}."
    )
