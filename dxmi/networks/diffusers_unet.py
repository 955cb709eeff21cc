"""diffusers' UNet2DModel as a denoiser."""

from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor, nn

from dxmi.compat import diffusers
from dxmi.errors import UserError
from dxmi.networks.base import Denoiser
from dxmi.networks.configs import DiffusersConfig
from dxmi.networks.layers import fan_in_uniform, image_event


class DiffusersDenoiser(Denoiser):
    """A UNet2DModel. The embedding consists of the step and the label only, since the model itself embeds both.

    Args:
        config: settings of the model.
        event: (C, H, W) of one sample, H = W.
        generator: draws the initial weights.

    Raises:
        UserError: diffusers is not installed, or refuses the config.
    """

    def __init__(self, config: DiffusersConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        in_channels, size = image_event(event, "UNet2DModel", least=1)
        self.classes = config.classes
        arguments = {key: value for key, value in asdict(config).items() if key not in ("kind", "classes")}
        arguments["num_class_embeds"] = config.classes or None
        model = diffusers().UNet2DModel
        try:
            with torch.device("meta"):
                network = model(sample_size=size, in_channels=in_channels, out_channels=in_channels, **arguments)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"diffusers refuses this UNet2DModel: {error}") from error
        self.model: nn.Module = _initialised(network, generator)

    def embed(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, 2]: the step, and a zero to which a label can be added."""
        step = steps.float()
        return torch.stack((step, torch.zeros_like(step)), dim=1)

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Map labels [B] to [B, 2]."""
        if not self.classes:
            return super().embed_labels(labels)
        label = labels.float()
        return torch.stack((torch.zeros_like(label), label), dim=1)

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Predict the noise in `x` [B, C, H, W], without dropout."""
        labels = embedding[:, 1].long() if self.classes else None
        (noise,) = self.model(x, embedding[:, 0], class_labels=labels, return_dict=False)
        return cast("Tensor", noise)


def _initialised(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Move a network from the meta device to the CPU with PyTorch's initialization, drawn from `generator`."""
    network.to_empty(device="cpu")
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.reset_parameters()
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, generator=generator)
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            bound = fan_in_uniform(layer.weight[0].numel(), 0)[0]
            with torch.no_grad():
                for parameter in layer.parameters(recurse=False):
                    parameter.uniform_(-bound, bound, generator=generator)
        elif any(True for _ in layer.parameters(recurse=False)):
            raise UserError(f"A UNet2DModel with a {type(layer).__name__} cannot be initialized from a seed.")
    return network
