# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Diffusion: from noise to emoji
#
# A diffusion model generates an image from noise. It is trained to predict the clean image from a
# noisy one, for every amount of noise. To generate an image, start with pure noise and remove a
# little noise at a time. We first do this with points in the plane, which are easy to plot, then
# with images.
#
# *Needs:* a little calculus, and `pellucid pull all-minilm-l6-v2`, which encodes the prompts.
# *Takes:* under a minute to run on two cores, half an hour to read.
# *Explains:* `diffusion/schedule.py`, `sample.py`, `model.py`, `pipeline.py`, `edit.py`.

# %%
import checks
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib_inline.backend_inline import set_matplotlib_formats

import diffusion
from diffusion import edit, pipeline, sample, schedule
from diffusion.schedule import NoiseLevel
from serve import settings
from serve.models import catalogue, download

jax.config.update("jax_compilation_cache_dir", str(settings.data_folder() / "compiled"))
set_matplotlib_formats("jpeg", pil_kwargs={"quality": 26})  # clouds of points make large PNGs
plt.rcParams["figure.dpi"] = 70


def plane(axes: plt.Axes, points: np.ndarray, title: str = "", color: object = "#3b6ea5") -> None:
    """Plot points in the plane without axes."""
    axes.scatter(*np.asarray(points).T, s=2, color=color, linewidths=0)
    axes.set(xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)


# %% [markdown]
# ## 1. Noise
#
# A noisy image is $z = \alpha x + \sigma e$, a weighted sum of the image $x$ and of Gaussian noise
# $e$. Here an "image" has only two values: it is a point, and the model shall generate points of
# this face.

# %%
PARTS = ("outline", "eyes", "mouth")
COLORS = np.array(["#3b6ea5", "#d1495b", "#e8a33d"])


def face(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random points of a face, and the part of each: float32 [N, 2], int [N]."""
    part = rng.choice(3, count, p=[0.5, 0.2, 0.3])
    full, arc = rng.uniform(0, 2 * np.pi, count), rng.uniform(1.15, 1.85, count) * np.pi
    centers = [
        np.stack([np.cos(full), np.sin(full)], -1),
        np.stack([rng.choice([-0.38, 0.38], count), np.full(count, 0.32)], -1),
        0.58 * np.stack([np.cos(arc), np.sin(arc)], -1),
    ]
    width = np.array([0.02, 0.07, 0.03])[part][:, None]
    points = np.stack(centers)[part, np.arange(count)] + width * rng.standard_normal((count, 2))
    return points.astype(np.float32), part


rng = np.random.default_rng(0)
points, parts = face(rng, 20_000)
noise = rng.standard_normal(points.shape).astype(np.float32)
figure, axes = plt.subplots(1, 5, figsize=(10, 2.3), layout="constrained")
for axis, t in zip(axes, (1.0, 0.9, 0.7, 0.4, 0.0), strict=True):
    level = schedule.from_flow(t)
    z = level.alpha * points + level.sigma * noise
    plane(axis, z[:3000], rf"$\alpha$ = {t:.1f}, $\sigma$ = {1 - t:.1f}", COLORS[parts[:3000]])
plt.show()

# %% [markdown]
# There are three common parameterizations of $\alpha$ and $\sigma$. In DDPM, $\alpha^2 + \sigma^2 =
# 1$, and a thousand small steps (*betas*) lead from the image to noise. In EDM, $\alpha = 1$ and
# $\sigma$ grows to 80. In a *flow*, $\alpha = t$ and $\sigma = 1 - t$.
#
# The left plot shows each as a path from the image to noise. Scaling $z$ gives no new information
# about $x$: only the ratio $\sigma / \alpha$ matters, the direction from the origin. Points on the
# same gray ray are equivalent, so the noise levels of one parameterization can be converted to
# those of another. The remaining choice is the noise levels of the sampling steps (right plot).

# %%
betas = schedule.linear_betas()
bars = schedule.alpha_bars(betas)
schedules = {
    "flow": schedule.flow_levels(20),
    "flow, shift 3": schedule.flow_levels(20, shift=3),
    "DDPM, linear betas": schedule.ddpm_levels(betas, 20),
    "DDPM, cosine": schedule.ddpm_levels(schedule.cosine_betas(), 20),
    "EDM": schedule.karras_levels(20),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
t = np.linspace(0, 1, 50)
for ratio in (0.1, 0.4, 1, 2.5, 10):
    left.plot([0, 3], [0, 3 * ratio], color="#dddddd", linewidth=1)
left.plot(t, 1 - t, label="flow")
left.plot(bars**0.5, (1 - bars) ** 0.5, label="DDPM")
left.plot([1, 1], [0, 3], label="EDM")
left.set(xlim=(0, 1.3), ylim=(0, 1.3), xlabel=r"$\alpha$", ylabel=r"$\sigma$", aspect="equal")
left.legend(fontsize=8)
for name, levels in schedules.items():
    right.plot([schedule.to_flow(level) for level in levels], marker=".", label=name)
right.set(xlabel="sampling step", ylabel="flow time with the same ratio")
right.legend(fontsize=8)
plt.show()

ddpm = schedule.from_alpha_bar(bars[300])
flow = schedule.from_flow(schedule.to_flow(ddpm))
z = ddpm.alpha * points + ddpm.sigma * noise
rescaled = schedule.rescale(z, ddpm, flow)
is_same = np.allclose(rescaled, flow.alpha * points + flow.sigma * noise, atol=1e-5)
print(f"step 300 of DDPM is sigma {ddpm.ratio:.2f} of EDM and time {flow.alpha:.3f} of a flow")
print(f"the noisy points of DDPM, rescaled, are those of the flow: {is_same}")

# %% [markdown]
# A network receives $z$ and can predict $x$, $e$, the mixture *v* of DDPM, or the velocity $x - e$
# of a flow. If $z$ is known, each prediction can be converted to every other:

# %%
errors = {}
for kind in schedule.PREDICTION_TYPES:
    prediction = schedule.target(kind, points, noise, ddpm)
    errors[kind] = np.abs(schedule.clean(kind, prediction, z, ddpm) - points).max()
print("x from the prediction, to 1e-5:", {kind: bool(e < 1e-5) for kind, e in errors.items()})

# %% [markdown]
# ## 2. The optimal prediction
#
# Many clean points $x$ can lead to the same noisy $z$. The prediction with the least squared error
# is their mean, weighted by the likelihood of the noise. For a known set of points, the weights are
# a softmax of distances. In the plots, the cross is $z$, the star is the prediction, and dark
# points have large weights.
#
# With much noise, the prediction is the mean of all points, which is not a point of the face. For
# this reason, one step is not enough to generate a point. With little noise, it is the nearest part
# of the face.


# %%
def optimal_prediction(z: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior mean of x for z [B, 2] at time t of a flow, and the weights [B, N]."""
    distance = ((z[:, None] - t * points[None, :3000]) ** 2).sum(-1)
    weights = np.asarray(jax.nn.softmax(-distance / (2 * (1 - t) ** 2), axis=-1))
    return weights @ points[:3000], weights


figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
for axis, t in zip(axes, (0.05, 0.5, 0.75, 0.9), strict=True):
    z = t * np.array([[0.75, 0.75]], np.float32)
    mean, weights = optimal_prediction(z, t)
    plane(axis, points[:3000], f"t = {t}", "#dddddd")
    opacity = np.clip(weights[0] / weights[0].max(), 0, 1)
    axis.scatter(*points[:3000].T, s=4, color="#3b6ea5", alpha=opacity, linewidths=0)
    axis.plot(*z[0], "x", color="black", markersize=8)
    axis.plot(*mean[0], "*", color="#d1495b", markersize=12)
plt.show()

# %% [markdown]
# ## 3. Train a network
#
# For a small set of points, the mean can be computed directly. For new images, a network learns the
# prediction (*flow matching*): mix a point and noise at a random time, let the network predict the
# velocity $x - e$, and minimize the squared error. The target is never the mean, but the mean has
# the least squared error.
#
# Our network has 37,000 weights. Its input includes the part of the face of the point. In one of
# five examples this input is zero, so that the network also learns the unconditional prediction,
# which guidance needs.

# %%
WIDTH, STEPS, BATCH = 128, 4000, 512


def init(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Return the matrices and biases of four layers."""
    sizes = (2 + 12 + 8 + 3, WIDTH, WIDTH, WIDTH, 2)
    keys = jax.random.split(key, 4)
    return [
        (jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def velocity(params, z, t, condition):
    """Predict velocities [B, 2] of z [B, 2] at times t [B]; condition: parts [B, 3] or zeros."""
    time_phases = jnp.pi * t[:, None] * 2.0 ** jnp.arange(4)
    phases = jnp.concatenate([z, 2 * z, 4 * z, time_phases], -1)  # Fourier features
    h = jnp.concatenate([z, jnp.sin(phases), jnp.cos(phases), condition], -1)
    for weight, bias in params[:-1]:
        h = jax.nn.silu(h @ weight + bias)
    return h @ params[-1][0] + params[-1][1]


def loss(params, key):
    pick, mix, times, drop = jax.random.split(key, 4)
    rows = jax.random.randint(pick, (BATCH,), 0, len(points))
    x, e = jnp.asarray(points)[rows], jax.random.normal(mix, (BATCH, 2))
    t = jax.random.uniform(times, (BATCH,))
    condition = jax.nn.one_hot(jnp.asarray(parts)[rows], 3)
    condition *= jax.random.bernoulli(drop, 0.8, (BATCH, 1))
    z = t[:, None] * x + (1 - t[:, None]) * e
    return ((velocity(params, z, t, condition) - (x - e)) ** 2).sum(-1).mean()


optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, STEPS))


@jax.jit
def train(params, key):
    """Perform all training steps; return the weights, and the loss of each step."""

    def step(state, key):
        params, optimizer_state = state
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), value

    state = (params, optimizer.init(params))
    (params, _), values = jax.lax.scan(step, state, jax.random.split(key, STEPS))
    return params, values


first = init(jax.random.key(0))
params, losses = train(first, jax.random.key(1))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} weights, {STEPS} steps")

# %% [markdown]
# The loss decreases and then stays constant, because most of it is not avoidable: no prediction can
# know the exact clean point. The gray line is the loss of the optimal prediction at each time; the
# network is close to it.

# %%
test_points, _ = face(rng, 1000)
test_noise = rng.standard_normal(test_points.shape).astype(np.float32)
unconditional = jnp.zeros((len(test_points), 3))
times = np.linspace(0.02, 0.9, 9)
network_losses, optimal_losses = [], []
for t in times:
    z = (t * test_points + (1 - t) * test_noise).astype(np.float32)
    predicted = velocity(params, z, jnp.full(len(z), t), unconditional)
    mean, _ = optimal_prediction(z, t)
    optimal = schedule.target("flow", mean, (z - t * mean) / (1 - t), schedule.from_flow(t))
    target = test_points - test_noise
    network_losses.append(float(((predicted - target) ** 2).sum(-1).mean()))
    optimal_losses.append(float(((optimal - target) ** 2).sum(-1).mean()))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
left.plot(np.convolve(losses, np.ones(50) / 50, "valid"))
left.set(title="Training loss", xlabel="step")
right.plot(times, optimal_losses, color="#bbbbbb", linewidth=5, label="optimal prediction")
right.plot(times, network_losses, label="network")
right.set(title="Unconditional loss by time", xlabel="t", ylim=(0, None))
right.legend()
plt.show()

# %% [markdown]
# ## 4. The velocity field
#
# The network predicts a velocity for every position and time. To generate points, start at random
# positions and follow the velocities from $t = 0$ to $1$. The upper plots show the velocities and
# the points at four times; the lower plots show some trajectories. They are straight at first,
# towards the center, and then bend towards the face.


# %%
def denoiser(part: int | None = None, scale: float = 1.0) -> sample.DenoiseFn:
    """Return a function that predicts clean points, of one part of the face or of all parts."""

    @jax.jit
    def clean(z, t):
        time = jnp.full(len(z), t)
        level = NoiseLevel(t, 1 - t)
        zeros = jnp.zeros((len(z), 3))
        unconditional = schedule.clean("flow", velocity(params, z, time, zeros), z, level)
        if part is None:
            return unconditional
        condition = zeros.at[:, part].set(1)
        conditional = schedule.clean("flow", velocity(params, z, time, condition), z, level)
        return sample.classifier_free_guidance(conditional, unconditional, scale)

    return lambda z, level: clean(z, level.alpha)


start = jnp.asarray(rng.standard_normal((2000, 2)), jnp.float32)
steps = sample.steps(denoiser(), start, schedule.flow_levels(100), "euler")
trajectory = np.stack([start, *(step.noisy for step in steps)])  # [101, N, 2]

axis_values = np.linspace(-1.8, 1.8, 19, dtype=np.float32)
grid = np.stack(np.meshgrid(axis_values, axis_values), -1).reshape(-1, 2)
figure, axes = plt.subplots(2, 4, figsize=(10, 5.2), layout="constrained")
for upper, lower, t in zip(axes[0], axes[1], (0.0, 0.4, 0.7, 0.9), strict=True):
    time, zeros = jnp.full(len(grid), t), jnp.zeros((len(grid), 3))
    velocities = np.asarray(velocity(params, grid, time, zeros))
    step = round(100 * t)
    plane(upper, trajectory[step], f"t = {t}", "#e8a33d")
    upper.quiver(*grid.T, *velocities.T, color="#3b6ea5", angles="xy", scale=40, width=0.004)
    last_step = {0: 25, 40: 50, 70: 75, 90: 100}[step]
    plane(lower, trajectory[last_step, :1], f"from t = 0 to {last_step / 100}")
    for i in range(60):
        lower.plot(*trajectory[: last_step + 1, i].T, color="#3b6ea5", linewidth=0.5)
    lower.plot(*trajectory[last_step, :60].T, ".", color="#d1495b", markersize=3)
plt.show()

# %% [markdown]
# ## 5. Samplers
#
# A hundred small steps follow the velocities accurately. But each step evaluates the network, which
# takes nearly all the time for images. Samplers differ in their accuracy with few steps. *Euler*
# moves along the velocity at the start of the step. *DDPM* replaces a part of the noise by new
# random noise at each step. *Heun* also evaluates the velocity at the end of the step and uses the
# mean of both, so a step needs two evaluations. *DPM-Solver++* extrapolates from the previous
# prediction. All share one loop (`diffusion/sample.py`).

# %%
COUNTS = (2, 4, 8, 16)
keys = sample.image_keys(0, len(start))
mean_distances = {}
figure, axes = plt.subplots(4, 4, figsize=(7.2, 7.4), layout="constrained")
for row, rule in zip(axes, ("euler", "ddpm", "heun", "dpmpp"), strict=True):
    for axis, count in zip(row, COUNTS, strict=True):
        levels = schedule.flow_levels(count // 2 if rule == "heun" else count)
        samples = np.asarray(sample.sample(denoiser(), start, levels, rule, keys=keys))
        distances = np.sqrt(((samples[:, None] - points[None, :3000]) ** 2).sum(-1).min(1))
        mean_distances[rule, count] = float(distances.mean())
        plane(axis, samples, f"{rule}, {count} evaluations")
plt.show()
for rule in ("euler", "ddpm", "heun", "dpmpp"):
    distances = [f"{mean_distances[rule, count]:.3f}" for count in COUNTS]
    print(f"{rule:6} mean distance from the face:", *distances)

# %% [markdown]
# ## 6. Guidance
#
# The prediction with the condition "mouth" differs from the unconditional prediction. *Guidance*
# multiplies this difference by a factor:
# $\hat x = \hat x_{\text{without}} + s\,(\hat x_{\text{with}} - \hat x_{\text{without}})$.
# With $s = 1$ the samples are mouths as in the training data. With 3 they leave out the ends of the
# mouth, which are near the outline, and with 7 all but the center, which is the most typical part.
# For images, guidance has the same effect: they match the prompt better and have less variety.

# %%
SCALES = (0.0, 1.0, 3.0, 7.0)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
deviations = {}
for axis, scale in zip(axes, SCALES, strict=True):
    denoise = denoiser(PARTS.index("mouth"), scale)
    samples = np.asarray(sample.sample(denoise, start, schedule.flow_levels(40), "heun"))
    deviations[scale] = float(samples[:, 0].std())
    plane(axis, points[:3000], color="#dddddd")
    plane(axis, samples, f'"mouth", guidance {scale:.0f}', COLORS[2])
plt.show()

# %% [markdown]
# ## 7. Images
#
# The model emoji-64 works in the same way. An image has 3,072 values instead of two (32 x 32 pixels
# with three colors; a small second network doubles the resolution). The network is a U-Net of 7
# million weights instead of four layers. The condition is the embedding of a prompt instead of a
# part. `DiffusionPipeline.steps` returns the noisy image and the predicted clean image of each
# step: the prediction is first an average apple, then a specific one.

# %%
folder = download.find_path(catalogue.load().models["all-minilm-l6-v2"], settings.data_folder())
emoji = diffusion.load(diffusion.weights_folder("emoji-64"), folder)
WORDS = ("red apple", "cat", "sun", "heart", "pizza", "tree", "fish", "smiling face")
prompts = [f"{word}, flat style" for word in WORDS]
keys = sample.image_keys(0, len(prompts))
trajectory = list(emoji.steps(prompts, keys, diffusion.SamplerOptions(guidance=3)))


def show(images: np.ndarray, columns: int, rows: list[str] | None = None, top=()) -> None:
    """Display images, uint8 [B, Y, X, C], as a grid with labels of rows and columns."""
    height, width = images.shape[1:3]
    num_rows = len(images) // columns
    figure, axes = plt.subplots(figsize=(10, 10 * num_rows * height / columns / width + 0.3))
    axes.imshow(pipeline.make_grid(images, columns))
    axes.set_yticks(height * (np.arange(num_rows) + 0.5), rows or [""] * num_rows)
    axes.set_xticks(width * (np.arange(columns) + 0.5), top or [""] * columns)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    plt.show()


show(emoji.trajectory_images(trajectory, row=0), 8, ["noisy", "predicted"])

# %% [markdown]
# **Guidance**, with the same noise. Stronger guidance gives stronger colors. These simple words are
# frequent in the training data, so the outlines need little guidance.

# %%
images = {3: emoji.postprocess(trajectory[-1][0])}
for scale in (1, 7):
    options = diffusion.SamplerOptions(guidance=scale)
    images[scale] = emoji.generate(prompts, seed=0, options=options)
show(np.concatenate([images[scale] for scale in (1, 3, 7)]), 8, ["1", "3", "7"], WORDS)

# %% [markdown]
# **Seeds.** Different noise gives a different image; the same noise gives exactly the same image.
# Each image has separate noise, so it does not depend on the other images of the batch.

# %%
seeds = emoji.generate([prompts[7]] * 8, seed=7)
same_seeds = emoji.generate([prompts[7]] * 4 + prompts[:4], seed=7)
show(seeds, 8)
print(f"the same seed gives the same images: {(seeds[:4] == same_seeds[:4]).all()}")

# %% [markdown]
# **An edit.** The lower half of a face is transparent, which marks the region to generate. At every
# noise level, the given half is replaced by the original with the same amount of noise, so that the
# network generates a lower half that matches it. At the end, the opaque pixels of the original are
# copied unchanged.

# %%
original = images[3][7]
half = np.concatenate([original, np.full((64, 64, 1), 255, np.uint8)], -1)
half[36:, :, 3] = 0
mask = edit.alpha_mask(half)
EDIT_PROMPTS = ("smiling face", "sad face", "angry face", "red apple")
inputs = {
    "images": np.stack([edit.preprocess_image(half, 32)] * 8),
    "masks": np.stack([edit.preprocess_mask(mask, 32)] * 8),
}
edit_prompts = [f"{prompt}, flat style" for prompt in EDIT_PROMPTS]
*_, (last, _) = edit.steps(emoji, 2 * edit_prompts, keys, diffusion.SamplerOptions(), **inputs)
edited = [edit.paste(original, image, mask) for image in emoji.postprocess(last)]
masked = edit.paste(original, np.full_like(original, 255), mask)
grid = np.stack([original, *edited[:4], masked, *edited[4:]])
show(grid, 5, top=["original, masked", *EDIT_PROMPTS])

# %% [markdown]
# **A variation** starts with a noisy version of an image instead of pure noise. The strength is the
# amount of noise: details that the noise hides are generated anew, the others are preserved.

# %%
rows, variation_keys = [], sample.image_keys(1, 8)  # different noise
for strength in (0.4, 0.7, 0.9):
    inputs = {
        "images": np.stack([edit.preprocess_image(original, 32)] * 8),
        "strength": strength,
    }
    options = diffusion.SamplerOptions()
    *_, (last, _) = edit.steps(emoji, ["face"] * 8, variation_keys, options, **inputs)
    rows.append(np.concatenate([original[None], emoji.postprocess(last)[:7]]))
show(np.concatenate(rows), 8, ["0.4", "0.7", "0.9"], ["original", *[""] * 7])

# %% [markdown]
# ## 8. Summary, as assertions

# %%
assert is_same, "parameterizations differ by a scale"
assert all(error < 1e-5 for error in errors.values()), "predictions can be converted"
assert all(a < 1.2 * b for a, b in zip(network_losses, optimal_losses, strict=True))
assert mean_distances["dpmpp", 8] < mean_distances["euler", 8], "extrapolation helps"
assert mean_distances["euler", 8] < mean_distances["euler", 2], "more steps help"
assert deviations[3.0] < deviations[1.0] < deviations[0.0], "guidance reduces variety"
assert (seeds[:4] == same_seeds[:4]).all() and (seeds[0] != seeds[1]).any()
assert all((image[:36] == original[:36]).all() for image in edited), "opaque pixels are unchanged"
changes = [np.abs(row[1:].astype(float) - row[0]).mean() for row in rows]
other_change = np.abs(images[3][:7].astype(float) - original).mean()
assert 0 < changes[0] < other_change, "variations differ, but less than other images"
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** DDPM defines a noise level by $\bar\alpha$, with $\alpha = \sqrt{\bar\alpha}$ and $\sigma =
# \sqrt{1 - \bar\alpha}$. Compute the time of a flow with the same ratio of noise to image.


# %% tags=["stub"]
def flow_time(alpha_bar: float) -> float:
    """Return the time t, 0 to 1, for which (1 - t) / t is DDPM's sigma / alpha."""
    ...


checks.report(checks.flow_time, flow_time)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def flow_time(alpha_bar: float) -> float:
#     alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
#     return alpha / (alpha + sigma)
# ```
# </details>
#
# **2.** The optimal prediction for numbers instead of images: $z = t x + (1 - t) e$, and $x$ is one
# of `candidates`, with equal probabilities. Compute the mean of $x$ given $z$.


# %% tags=["stub"]
def posterior_mean(z: float, t: float, candidates: list[float]) -> float:
    """Return the posterior mean of x given z, for t below 1."""
    ...


checks.report(checks.posterior_mean, posterior_mean)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def posterior_mean(z: float, t: float, candidates: list[float]) -> float:
#     x = np.array(candidates)
#     scores = -((z - t * x) ** 2) / (2 * (1 - t) ** 2)
#     weights = np.exp(scores - scores.max())
#     return float((weights * x).sum() / weights.sum())
# ```
# </details>
#
# **3.** Heun's method. Integrate from $t = 0$ to $1$ in equal steps: compute the velocity at the
# start of a step, predict the end of the step with it, compute the velocity there, and take the
# step with the mean of both velocities.


# %% tags=["stub"]
def heun(velocity, z: float, steps: int) -> float:
    """Return z at t = 1 for the velocity field `velocity(z, t)`."""
    ...


checks.report(checks.heun, heun)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def heun(velocity, z: float, steps: int) -> float:
#     for i in range(steps):
#         t, next_t = i / steps, (i + 1) / steps
#         v_start = velocity(z, t)
#         v_end = velocity(z + v_start / steps, next_t)
#         z += (v_start + v_end) / 2 / steps
#     return z
# ```
# </details>
#
# Read next: `diffusion/unet.py` about the network, `training/recipes/emoji.py` about its training,
# then `serve/models/images.py` about batches of requests.
