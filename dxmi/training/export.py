"""Export of a trained policy: its denoiser in the format of diffusers, and the coefficients of its steps."""

from pathlib import Path
from typing import Any

from dxmi.diffusion.policy import Policy
from dxmi.errors import UserError
from dxmi.networks.pretrained.diffusers_folder import write_folder
from dxmi.networks.unet import Unet
from dxmi.persistence.files import write_json
from dxmi.training.loading import LoadedRun

SAMPLER = "sampler.json"
_RULE = (
    "x starts as start_sigma * z; then, for t = 0 .. num_steps - 1, x = signal_scale[t] * x + output_scale[t] * "
    "model(input_scale[t] * x, torch.tensor(timestep[t])).sample + sigma[t] * z, with a new standard normal z each "
    "time. Pixels are in [-1, 1]. A timestep may be fractional, and diffusers rounds one that is not a tensor."
)


def export_diffusers(loaded: LoadedRun, folder: Path) -> None:
    """Write the policy of a run as a diffusers model, with its steps in `sampler.json` in the same folder.

    Args:
        loaded: the run.
        folder: folder of the model, which must be empty if it exists.

    Raises:
        UserError: the folder is not empty, or the denoiser is not a U-Net.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another --out, or delete it.")
    policy = loaded.algorithm.eval_policy
    write_folder(policy.network, policy.event, folder)
    write_json(folder / SAMPLER, sampler_tree(policy))


def sampler_tree(policy: Policy) -> dict[str, Any]:
    """The coefficients of a policy's steps as plain numbers, for use with `model(x, timestep)` of diffusers."""
    scale = policy.network.style.step_scale if isinstance(policy.network, Unet) else 1.0
    ones = [1.0] * policy.num_steps
    return {
        "rule": _RULE,
        "num_steps": policy.num_steps,
        "start_sigma": policy.start_sigma,
        "timestep": (policy.timestep * scale).tolist(),
        "input_scale": policy.input_scale.tolist() if policy.scales_input else ones,
        "signal_scale": policy.signal_scale.tolist(),
        "output_scale": policy.output_scale.tolist(),
        "sigma": policy.log_sigma.detach().exp().tolist(),
    }
