"""Makes what schedules, conversions and samplers are compared with, by diffusers.

    python make_diffusion.py

It needs diffusers and torch. The network is a dummy, `dummy` below: what it takes for the clean
picture depends on the noisy one and on the ratio of noise to picture, whatever the notation.
Written beside this file, schedulers.npz, float32 unless said otherwise:

    start [2, 4, 4, 3]           noise of standard deviation 1, what every sampler begins from
    picture [2, 4, 4, 3]         a clean picture, to be made noisy
    linear, cosine [1000]        alpha-bars of diffusers' two schedules
    noisy, velocity [5, 2, ...]  picture and start mixed at steps `mixed` of "linear", and v
    flow_noisy [5, 2, ...]       the same at sigmas `mixed_flow` of a flow
    SAMPLER [n, 2, 4, 4, 3]      the noisy pictures after each of its steps
    SAMPLER_sigmas [n + 1]       ratios of noise to picture, or sigmas of the flow
    ddpm_noise [n, 2, 4, 4, 3]   what DDPM drew
    epsilon, sample, v_prediction [2, ...]  the clean picture that DDIM takes from each kind of
                                 prediction 0.3 * start + 0.1, at step 500
"""

import platform
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm

HERE = Path(__file__).parent
SHAPE = (2, 4, 4, 3)
STEPS = 10


def dummy(z: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The clean picture that the dummy sees."""
    t = alpha / (alpha + sigma)
    pattern = torch.linspace(-1, 1, z[0].numel()).reshape(z.shape[1:])
    return 0.7 * torch.tanh(1.5 * z / (alpha + sigma) + (1 - t) * pattern)


def walk(scheduler, z: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The noisy pictures after each step, and the sigmas of the scheduler.

    Args:
        kind: "vp" where z has variance 1, "ve" where alpha is 1, "flow" for a straight flow.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    seen = []
    for number, t in enumerate(scheduler.timesteps):
        if sigmas is None:
            bar = scheduler.alphas_cumprod[t].item()
            alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        else:
            ratio = sigmas[number].item()
            alpha, sigma = {
                "vp": (1 / (1 + ratio**2) ** 0.5, ratio / (1 + ratio**2) ** 0.5),
                "ve": (1.0, ratio),
                "flow": (1 - ratio, ratio),
            }[kind]
        x = dummy(z, alpha, sigma)
        e = (z - alpha * x) / sigma
        said = e - x if kind == "flow" else e
        z = scheduler.step(said, t, z, return_dict=False)[0]
        seen.append(z.numpy().copy())
    return np.stack(seen), np.array([] if sigmas is None else sigmas, np.float64)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator)
    picture = torch.rand(SHAPE, generator=generator) * 2 - 1
    noises = [torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]
    found = {"start": start, "picture": picture, "ddpm_noise": torch.stack(noises)}

    linear = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="leading")
    found["linear"] = linear.alphas_cumprod
    found["cosine"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod

    mixed = torch.tensor([0, 10, 250, 500, 999])
    found["mixed"] = mixed
    found["noisy"] = torch.stack(
        [linear.add_noise(picture, start, step[None].expand(2)) for step in mixed]
    )
    found["velocity"] = torch.stack(
        [linear.get_velocity(picture, start, step[None].expand(2)) for step in mixed]
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    which = [0, 10, 250, 500, 998]
    found["mixed_flow"] = flow.sigmas[which]
    found["flow_noisy"] = torch.stack(
        [flow.scale_noise(picture, flow.timesteps[i][None], start) for i in which]
    )
    for kind in ("epsilon", "sample", "v_prediction"):
        ddim = diffusers.DDIMScheduler(
            clip_sample=False, prediction_type=kind, beta_schedule="linear"
        )
        ddim.set_timesteps(1000)
        found[kind] = ddim.step(0.3 * start + 0.1, 500, start).pred_original_sample

    def keep(name: str, scheduler, kind: str, scale: float = 1.0) -> None:
        found[name], sigmas = walk(scheduler, start * scale, kind)
        if len(sigmas):
            found[f"{name}_sigmas"] = sigmas

    ddim = diffusers.DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(STEPS)
    keep("ddim", ddim, "vp")

    draws = iter(noises)
    scheduling_ddpm.randn_tensor = lambda *args, **kw: next(draws)
    linear.set_timesteps(STEPS)
    keep("ddpm", linear, "vp")

    multistep = diffusers.DPMSolverMultistepScheduler(
        use_karras_sigmas=True, final_sigmas_type="zero", lower_order_final=False
    )
    multistep.set_timesteps(STEPS)
    keep("dpmpp", multistep, "vp")

    flowing = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        final_sigmas_type="zero",
        lower_order_final=False,
        flow_shift=2.0,
    )
    flowing.set_timesteps(STEPS)
    keep("dpmpp_flow", flowing, "flow")

    euler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    euler.set_timesteps(STEPS)
    sigma = euler.sigmas[0].item()
    euler.is_scale_input_called = True
    keep("euler_sigma", euler, "ve", sigma)

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(STEPS)
    keep("euler_flow", flow, "flow")

    found |= {name: np.asarray(array, np.float32) for name, array in found.items()
              if not name.endswith("sigmas") and name != "mixed"}  # fmt: skip
    heun, sigmas = walk_heun(start)
    found |= {"heun": heun, "heun_sigmas": sigmas}
    found["versions"] = np.array(
        f"diffusers {diffusers.__version__}, torch {version('torch')}, "
        f"Python {platform.python_version()}"
    )
    np.savez_compressed(HERE / "schedulers.npz", **{n: np.asarray(a) for n, a in found.items()})


def walk_heun(z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Heun calls the network twice a step: the pictures after each whole step."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    seen, sigmas = [], [scheduler.sigmas[0].item()]
    for number, t in enumerate(scheduler.timesteps):
        # Every level but the first and the last stands twice in the list.
        sigma = scheduler.sigmas[number].item()
        x = dummy(z, 1 - sigma, sigma)
        was_first = scheduler.state_in_first_order
        z = scheduler.step((z - (1 - sigma) * x) / sigma - x, t, z, return_dict=False)[0]
        if not was_first or number == len(scheduler.timesteps) - 1:
            seen.append(z.numpy().copy())
            sigmas.append(scheduler.sigmas[number + 1].item())
    return np.stack(seen).astype(np.float32), np.array(sigmas)


if __name__ == "__main__":
    main()
