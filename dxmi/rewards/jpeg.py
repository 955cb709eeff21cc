"""The size of an image as JPEG, a reward that is not differentiable (DDPO, arXiv 2305.13301)."""

import io

import torch
from PIL import Image
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.rewards.configs import JpegRewardConfig
from dxmi.tensors import to_uint8

_BYTES = 1000.0
_COLORS = 3


class JpegReward:
    """Kilobytes of the JPEG beyond those of a black image, or minus them.

    Below about 28x28 pixels, the header is nearly all of the file and the size says little.

    Args:
        config: Settings: goal and quality.
    """

    def __init__(self, config: JpegRewardConfig) -> None:
        self._config = config
        self._sign = -1.0 if config.goal == "compressible" else 1.0
        self._blank: dict[tuple[int, ...], int] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (rewards share a signature)
        """Compute the reward of each sample: [B].

        Raises:
            UserError: the samples are not images with one or three channels.
        """
        event = tuple(x.shape[1:])
        if len(event) != 3 or event[0] not in (1, _COLORS):
            raise UserError(f"reward.kind is jpeg, which scores images, but samples have shape {event}.")
        if event not in self._blank:
            self._blank[event] = self._size(torch.zeros(event, dtype=torch.uint8))
        sizes = [self._size(image) - self._blank[event] for image in to_uint8(x).cpu()]
        return self._sign * torch.tensor(sizes, dtype=torch.float32, device=x.device) / _BYTES

    def _size(self, image: Tensor) -> int:
        """Bytes of the JPEG of an image [C, H, W]."""
        pixels = image.permute(1, 2, 0).numpy() if len(image) == _COLORS else image[0].numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=self._config.quality)
        return buffer.tell()
