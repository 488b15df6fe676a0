"""Make the golden file of schedules, conversions and samplers with diffusers.

    python make_diffusion.py

It needs diffusers and torch. The network is the function `dummy` below: its clean image depends on
the noisy image and on the ratio of noise to image, in any notation. It writes schedulers.npz beside
this file, float32 unless noted:

    start [2, 4, 4, 3]           noise of standard deviation 1, the start of every sampler
    picture [2, 4, 4, 3]         a clean image, to add noise to
    linear, cosine [1000]        alpha-bars of diffusers' two schedules
    noisy, velocity [5, 2, ...]  picture and start mixed at steps `mixed` of "linear", and v
    flow_noisy [5, 2, ...]       the same at sigmas `mixed_flow` of a flow
    SAMPLER [n, 2, 4, 4, 3]      the noisy images after each step
    SAMPLER_sigmas [n + 1]       ratios of noise to image, or sigmas of the flow
    ddpm_noise [n, 2, 4, 4, 3]   the fresh noise of DDPM
    epsilon, sample, v_prediction [2, ...]  the clean image that DDIM computes from each prediction
                                 type, the output being 0.3 * start + 0.1, at step 500
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
    """Return the clean image predicted by the dummy network."""
    t = alpha / (alpha + sigma)
    pattern = torch.linspace(-1, 1, z[0].numel()).reshape(z.shape[1:])
    return 0.7 * torch.tanh(1.5 * z / (alpha + sigma) + (1 - t) * pattern)


def walk(scheduler, z: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the noisy images after each step, and the sigmas of the scheduler.

    Args:
        scheduler: a scheduler of diffusers, with its timesteps set.
        z: the initial noise.
        kind: "vp" if z has variance 1, "ve" if alpha is 1, "flow" for a straight flow.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    images = []
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
        output = e - x if kind == "flow" else e
        z = scheduler.step(output, t, z, return_dict=False)[0]
        images.append(z.numpy().copy())
    return np.stack(images), np.array([] if sigmas is None else sigmas, np.float64)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator)
    picture = torch.rand(SHAPE, generator=generator) * 2 - 1
    noises = [torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]
    golden = {"start": start, "picture": picture, "ddpm_noise": torch.stack(noises)}

    linear = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="leading")
    golden["linear"] = linear.alphas_cumprod
    golden["cosine"] = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod

    mixed = torch.tensor([0, 10, 250, 500, 999])
    golden["mixed"] = mixed
    golden["noisy"] = torch.stack(
        [linear.add_noise(picture, start, step[None].expand(2)) for step in mixed]
    )
    golden["velocity"] = torch.stack(
        [linear.get_velocity(picture, start, step[None].expand(2)) for step in mixed]
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    indices = [0, 10, 250, 500, 998]
    golden["mixed_flow"] = flow.sigmas[indices]
    golden["flow_noisy"] = torch.stack(
        [flow.scale_noise(picture, flow.timesteps[i][None], start) for i in indices]
    )
    for kind in ("epsilon", "sample", "v_prediction"):
        ddim = diffusers.DDIMScheduler(
            clip_sample=False, prediction_type=kind, beta_schedule="linear"
        )
        ddim.set_timesteps(1000)
        golden[kind] = ddim.step(0.3 * start + 0.1, 500, start).pred_original_sample

    def add(name: str, scheduler, kind: str, scale: float = 1.0) -> None:
        golden[name], sigmas = walk(scheduler, start * scale, kind)
        if len(sigmas):
            golden[f"{name}_sigmas"] = sigmas

    ddim = diffusers.DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(STEPS)
    add("ddim", ddim, "vp")

    draws = iter(noises)
    scheduling_ddpm.randn_tensor = lambda *args, **kw: next(draws)
    linear.set_timesteps(STEPS)
    add("ddpm", linear, "vp")

    multistep = diffusers.DPMSolverMultistepScheduler(
        use_karras_sigmas=True, final_sigmas_type="zero", lower_order_final=False
    )
    multistep.set_timesteps(STEPS)
    add("dpmpp", multistep, "vp")

    flowing = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        final_sigmas_type="zero",
        lower_order_final=False,
        flow_shift=2.0,
    )
    flowing.set_timesteps(STEPS)
    add("dpmpp_flow", flowing, "flow")

    euler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    euler.set_timesteps(STEPS)
    sigma = euler.sigmas[0].item()
    euler.is_scale_input_called = True
    add("euler_sigma", euler, "ve", sigma)

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(STEPS)
    add("euler_flow", flow, "flow")

    golden |= {name: np.asarray(array, np.float32) for name, array in golden.items()
              if not name.endswith("sigmas") and name != "mixed"}  # fmt: skip
    heun, sigmas = walk_heun(start)
    golden |= {"heun": heun, "heun_sigmas": sigmas}
    golden["versions"] = np.array(
        f"diffusers {diffusers.__version__}, torch {version('torch')}, "
        f"Python {platform.python_version()}"
    )
    np.savez_compressed(HERE / "schedulers.npz", **{n: np.asarray(a) for n, a in golden.items()})


def walk_heun(z: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the noisy images and sigmas after each step of Heun, which has two network calls."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    images, sigmas = [], [scheduler.sigmas[0].item()]
    for number, t in enumerate(scheduler.timesteps):
        # Every level but the first and the last occurs twice in the list.
        sigma = scheduler.sigmas[number].item()
        x = dummy(z, 1 - sigma, sigma)
        was_first = scheduler.state_in_first_order
        z = scheduler.step((z - (1 - sigma) * x) / sigma - x, t, z, return_dict=False)[0]
        if not was_first or number == len(scheduler.timesteps) - 1:
            images.append(z.numpy().copy())
            sigmas.append(scheduler.sigmas[number + 1].item())
    return np.stack(images).astype(np.float32), np.array(sigmas)


if __name__ == "__main__":
    main()
