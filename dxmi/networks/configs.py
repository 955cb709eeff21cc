"""Settings of the networks: one class for each kind. Nothing here imports PyTorch."""

from dataclasses import dataclass

_MAX_CLASSES = 100_000
_MAX_WIDTH, _MAX_LAYERS, _MAX_GAIN = 16_384, 256, 1e3
_MAX_CHANNELS, _MAX_BLOCKS, _MAX_LEVELS, _MAX_PATCH = 4096, 64, 12, 64
_MAX_LATENT, _MAX_LATENT_LAYERS = 65_536, 64
_MAX_DEPTH, _MAX_WIDENING = 1000, 100


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The part of a network's config that all kinds share."""

    kind: str = "mlp"
    """Which network: its key in `dxmi.networks.registry`."""
    classes: int = 0
    """Number of classes on which the network is conditioned; 0 for an unconditional network."""

    def __post_init__(self) -> None:
        if not 0 <= self.classes <= _MAX_CLASSES:
            raise ValueError(f"classes is {self.classes}: it must be in 0..{_MAX_CLASSES}")


@dataclass(frozen=True, kw_only=True)
class MlpConfig(NetworkConfig):
    """A plain MLP with SiLU between its layers."""

    kind: str = "mlp"
    hidden: int = 512
    """Width of the hidden layers."""
    layers: int = 5
    """Number of linear layers, including the output layer."""
    embedding: int = 100
    """Width of the sinusoidal step embedding; not used by an energy, which does not depend on time."""
    first_gain: float = 1.0
    """Factor of the first layer's initial weights. In the plane, an MLP with 1 learns all but the coarsest features of
    a density slowly; with 3 it learns the eight Gaussians within a few hundred iterations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.hidden <= _MAX_WIDTH:
            raise ValueError(f"hidden is {self.hidden}: it must be in 1..{_MAX_WIDTH}")
        if not 2 <= self.layers <= _MAX_LAYERS:
            raise ValueError(f"layers is {self.layers}: it must be in 2..{_MAX_LAYERS}")
        if not 2 <= self.embedding <= _MAX_WIDTH or self.embedding % 2:
            raise ValueError(f"embedding is {self.embedding}: it must be even and in 2..{_MAX_WIDTH}")
        if not 0.0 < self.first_gain <= _MAX_GAIN:
            raise ValueError(f"first_gain is {self.first_gain}: it must be greater than 0 and at most {_MAX_GAIN:g}")


@dataclass(frozen=True, kw_only=True)
class UnetConfig(NetworkConfig):
    """DDPM's U-Net; the defaults are those for CIFAR-10."""

    kind: str = "unet"
    channels: int = 128
    """Channels that `multipliers` multiply, and the width of the sinusoidal step embedding."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level as multiples of `channels`; each level has half the resolution of the previous one."""
    blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more per level."""
    attention: tuple[int, ...] | None = (16,)
    """Heights, in patches, of the levels with attention after each block; null for none. The middle always has one."""
    head_channels: int | None = None
    """Channels of each attention head; null for a single head."""
    groups: int = 32
    """Number of groups of each GroupNorm."""
    dropout: float = 0.1
    """Dropout rate in each residual block while pretraining; fine-tuning and sampling use no dropout."""
    channels_last: bool = False
    """Use the channels-last memory format, which is faster on GPUs with tensor cores."""
    patch: int = 1
    """Side of the square patches whose pixels are stacked as channels; 2 needs a quarter of the compute and memory."""
    recompute: bool = False
    """Recompute the activations of each block in the backward pass: less memory, but a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.multipliers) <= _MAX_LEVELS or min(self.multipliers) < 1:
            raise ValueError(f"multipliers is {list(self.multipliers)}: it must be 1 to {_MAX_LEVELS} positive numbers")
        if not 1 <= self.channels * max(self.multipliers) <= _MAX_CHANNELS or self.channels % 2:
            raise ValueError(
                f"channels is {self.channels}: it must be even, and at most {_MAX_CHANNELS} over the largest multiplier"
            )
        if not 1 <= self.blocks <= _MAX_BLOCKS:
            raise ValueError(f"blocks is {self.blocks}: it must be in 1..{_MAX_BLOCKS}")
        if self.groups < 1 or self.channels % self.groups:
            raise ValueError(f"groups is {self.groups}: it must divide channels, which is {self.channels}")
        if self.head_channels is not None and (self.head_channels < 1 or self.channels % self.head_channels):
            raise ValueError(
                f"head_channels is {self.head_channels}: it must divide channels, which is {self.channels}"
            )
        if not 1 <= self.patch <= _MAX_PATCH:
            raise ValueError(f"patch is {self.patch}: it must be in 1..{_MAX_PATCH}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EdmUnetConfig(UnetConfig):
    """The ADM U-Net; the defaults are those of EDM for ImageNet-64."""

    kind: str = "edm_unet"
    channels: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] | None = (32, 16, 8)
    head_channels: int | None = 64
    dropout: float = 0.0
    scale_shift: bool = True
    """Scale and shift the output of each block's second norm by the embedding, instead of adding it before the norm."""
    resample_in_blocks: bool = True
    """Change the resolution in residual blocks, instead of by a strided convolution or an upsampling layer."""
    step_scale: float = 1.0
    """Factor of the diffusion step before it is embedded. The Karras schedule gives the network 250 log sigma, on which
    OpenAI's networks were trained. NVIDIA's were trained on a thousandth of that: use 0.001 for them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.step_scale <= 1e6:
            raise ValueError(f"step_scale is {self.step_scale}: it must be in (0, 1e6]")


@dataclass(frozen=True, kw_only=True)
class NcsnppGanConfig(NetworkConfig):
    """The generator of a denoising-diffusion GAN; the defaults are those for CIFAR-10."""

    kind: str = "ncsnpp_gan"
    channels: int = 128
    """Channels that `multipliers` multiply, and the width of the sinusoidal step embedding."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level as multiples of `channels`; each level has half the resolution of the previous one."""
    blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more per level."""
    attention: tuple[int, ...] | None = (16,)
    """Heights of the levels with attention; null for none. The middle always has one."""
    latent: int = 100
    """Z, the dimension of the latent."""
    latent_embedding: int = 256
    """Width of the embedded latent."""
    latent_layers: int = 4
    """Number of layers of the latent's MLP, not counting the first."""
    channels_last: bool = False
    """Use the channels-last memory format, which is faster on GPUs with tensor cores."""
    recompute: bool = False
    """Recompute the activations of each block in the backward pass: less memory, but a third more time."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.multipliers) <= _MAX_LEVELS or min(self.multipliers) < 1:
            raise ValueError(f"multipliers is {list(self.multipliers)}: it must be 1 to {_MAX_LEVELS} positive numbers")
        if not 4 <= self.channels <= _MAX_CHANNELS or self.channels % 4:
            raise ValueError(f"channels is {self.channels}: it must be a multiple of 4, at most {_MAX_CHANNELS}")
        if not 1 <= self.blocks <= _MAX_BLOCKS:
            raise ValueError(f"blocks is {self.blocks}: it must be in 1..{_MAX_BLOCKS}")
        super().__post_init__()
        if self.classes:
            raise ValueError(f"classes is {self.classes}: this generator is unconditional, so make it 0")
        for name in ("latent", "latent_embedding"):
            if not 1 <= getattr(self, name) <= _MAX_LATENT:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be in 1..{_MAX_LATENT}")
        if not 0 <= self.latent_layers <= _MAX_LATENT_LAYERS:
            raise ValueError(f"latent_layers is {self.latent_layers}: it must be in 0..{_MAX_LATENT_LAYERS}")


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig(NetworkConfig):
    """The arguments of diffusers' UNet2DModel; the defaults are those of google/ddpm-cifar10-32."""

    kind: str = "diffusers"
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    """Channels of each level, highest resolution first."""
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    """Block type of each level of the encoder."""
    up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    """Block type of each level of the decoder, lowest resolution first."""
    layers_per_block: int = 2
    """Residual blocks per level of the encoder; the decoder has one more per level."""
    downsample_padding: int = 0
    """Padding of the downsampling convolutions; 0 pads only the right and the bottom side, as in DDPM."""
    downsample_type: str = "conv"
    """Downsampling of the levels with attention: conv or resnet."""
    upsample_type: str = "conv"
    """Upsampling of the levels with attention: conv or resnet."""
    act_fn: str = "silu"
    """Activation function."""
    attention_head_dim: int | None = None
    """Channels of each attention head; null for a single head."""
    norm_num_groups: int = 32
    """Number of groups of each GroupNorm."""
    attn_norm_num_groups: int | None = None
    """Groups of the GroupNorm before the attention in the middle; null for the default of diffusers."""
    norm_eps: float = 1e-6
    """Epsilon of each GroupNorm."""
    resnet_time_scale_shift: str = "default"
    """How the step embedding enters a residual block: default (added) or scale_shift."""
    freq_shift: int = 1
    """With 1, the last frequency of the step embedding is 1 / 10,000; with 0, it is a little higher."""
    flip_sin_to_cos: bool = False
    """Put the cosines of the step embedding before the sines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types)}
        if len(lengths) > 1:
            raise ValueError("block_out_channels, down_block_types and up_block_types must have as many entries each")
        if min(self.block_out_channels) < 1:
            raise ValueError(f"block_out_channels is {list(self.block_out_channels)}: all must be positive")


@dataclass(frozen=True, kw_only=True)
class IgebmConfig(NetworkConfig):
    """The IGEBM energy, which most of the published image experiments use."""

    kind: str = "igebm"
    channels: int = 128
    """Channels of the first two blocks; the others have twice as many."""
    spectral_norm: bool = False
    """Divide the weights of each convolution by their largest singular value."""
    output_scale: bool = True
    """Learn a scale and a shift of the output."""
    embedding: int = 128
    """Width of the sinusoidal step embedding; not used by an energy, which does not depend on time."""
    channels_last: bool = False
    """Use the channels-last memory format, which is faster on GPUs with tensor cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.channels <= _MAX_CHANNELS:
            raise ValueError(f"channels is {self.channels}: it must be in 1..{_MAX_CHANNELS}")
        if not 2 <= self.embedding <= _MAX_CHANNELS or self.embedding % 2:
            raise ValueError(f"embedding is {self.embedding}: it must be even and in 2..{_MAX_CHANNELS}")


@dataclass(frozen=True, kw_only=True)
class WideResNetConfig(NetworkConfig):
    """A wide residual network; the defaults are those of the published LSUN energy."""

    kind: str = "wide_resnet"
    depth: int = 16
    """Number of convolutions: 6 n + 4 with n blocks per group."""
    width: int = 10
    """Factor k of the 16, 32 and 64 channels of the three groups."""
    groups: int = 4
    """Number of groups of each GroupNorm; 0 for no normalization."""
    embedding: int = 128
    """Width of the sinusoidal step embedding; not used by an energy, which does not depend on time."""
    channels_last: bool = False
    """Use the channels-last memory format, which is faster on GPUs with tensor cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 10 <= self.depth <= _MAX_DEPTH or (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}: it must be 10, 16, 22 and so on, at most {_MAX_DEPTH}")
        if not 1 <= self.width <= _MAX_WIDENING:
            raise ValueError(f"width is {self.width}: it must be in 1..{_MAX_WIDENING}")
        if self.groups < 0 or (self.groups and 16 % self.groups):
            raise ValueError(f"groups is {self.groups}: it must be 0, or divide 16")
        if not 2 <= self.embedding <= 4096 or self.embedding % 2:
            raise ValueError(f"embedding is {self.embedding}: it must be even and in 2..4096")
