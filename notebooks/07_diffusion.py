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
# To make a picture out of noise, learn the reverse: how to see the picture behind *a little* noise.
# Whoever can do that for every amount of noise can begin at noise alone and take it away a little
# at a time. We first do it with points in the plane, where all of it can be drawn, then with
# pictures.
#
# *Needs:* a little calculus, and `pellucid pull all-minilm-l6-v2`, which reads the prompts.
# *Takes:* under a minute to run on two cores, half an hour to read.
# *Explains:* `diffusion/schedule.py`, `sample.py`, `model.py`, `painter.py`, `edit.py`.

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
    """Points in the plane, without anything around them."""
    axes.scatter(*np.asarray(points).T, s=2, color=color, linewidths=0)
    axes.set(xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)


# %% [markdown]
# ## 1. Noise
#
# A noisy picture is $z = \alpha x + \sigma e$: so much of the picture $x$, and so much noise $e$,
# which is a number from the bell curve for each of its values. Here a picture has only two values:
# it is a point, and what we want to draw is any point of this face.

# %%
PARTS = ("outline", "eyes", "mouth")
COLORS = np.array(["#3b6ea5", "#d1495b", "#e8a33d"])


def face(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of a face, and which part of it each is of: float32 [N, 2], int [N]."""
    part = rng.choice(3, count, p=[0.5, 0.2, 0.3])
    around, along = rng.uniform(0, 2 * np.pi, count), rng.uniform(1.15, 1.85, count) * np.pi
    places = [
        np.stack([np.cos(around), np.sin(around)], -1),
        np.stack([rng.choice([-0.38, 0.38], count), np.full(count, 0.32)], -1),
        0.58 * np.stack([np.cos(along), np.sin(along)], -1),
    ]
    width = np.array([0.02, 0.07, 0.03])[part][:, None]
    points = np.stack(places)[part, np.arange(count)] + width * rng.standard_normal((count, 2))
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
# How much of each? The literature knows three notations. In DDPM's, $\alpha^2 + \sigma^2 = 1$, and
# a thousand small steps (*betas*) lead from one end to the other. In EDM's, the picture stays as it
# is ($\alpha = 1$) and $\sigma$ grows to 80. In a *flow*, $\alpha = t$ and $\sigma = 1 - t$.
#
# On the left, each is a path from picture to noise. But scaling $z$ tells nothing new about $x$:
# only the ratio $\sigma / \alpha$ counts, which is the direction as seen from the origin. Points on
# one grey ray are the same knowledge, and so each notation has words for every other one's levels.
# What is left to choose is where the steps go (on the right).

# %%
betas = schedule.linear_betas()
bars = schedule.alpha_bars(betas)
visited = {
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
for name, levels in visited.items():
    right.plot([schedule.to_flow(level) for level in levels], marker=".", label=name)
right.set(xlabel="step of a sampler", ylabel="time of a flow with this ratio")
right.legend(fontsize=8)
plt.show()

ddpm = schedule.from_alpha_bar(bars[300])
flow = schedule.from_flow(schedule.to_flow(ddpm))
z = ddpm.alpha * points + ddpm.sigma * noise
moved = schedule.rescale(z, ddpm, flow)
is_same = np.allclose(moved, flow.alpha * points + flow.sigma * noise, atol=1e-5)
print(f"DDPM's step 300 is sigma {ddpm.ratio:.2f} of EDM's and time {flow.alpha:.3f} of a flow")
print(f"the noisy points of the one, scaled, are those of the other: {is_same}")

# %% [markdown]
# A network sees $z$ and can be asked for $x$, for $e$, for DDPM's mixture *v*, or for the velocity
# $x - e$ at which a flow moves. With $z$ known, each follows from each:

# %%
errors = {}
for kind in schedule.PREDICTION_TYPES:
    said = schedule.target(kind, points, noise, ddpm)
    errors[kind] = np.abs(schedule.clean(kind, said, z, ddpm) - points).max()
print("x from what was said, to 1e-5:", {kind: bool(e < 1e-5) for kind, e in errors.items()})

# %% [markdown]
# ## 2. The best guess
#
# What $x$ is behind a noisy $z$? Many could be. The guess with the least squared error is their
# mean, each weighted by how likely its noise is, and for a known set of points that is a softmax of
# distances. Below, the cross is $z$ and the star the guess; dark points are likely ones.
#
# At much noise the guess is the mean of all faces' points, where no face has a point: this is why
# one cannot draw in a single step. At little noise it is the nearest piece of the face.


# %%
def best_guess(z: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """The mean of `points` as seen from z [B, 2] at time t of a flow, and the weights [B, N]."""
    distance = ((z[:, None] - t * points[None, :3000]) ** 2).sum(-1)
    weights = np.asarray(jax.nn.softmax(-distance / (2 * (1 - t) ** 2), axis=-1))
    return weights @ points[:3000], weights


figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
for axis, t in zip(axes, (0.05, 0.5, 0.75, 0.9), strict=True):
    here = t * np.array([[0.75, 0.75]], np.float32)
    guess, weights = best_guess(here, t)
    plane(axis, points[:3000], f"t = {t}", "#dddddd")
    shown = np.clip(weights[0] / weights[0].max(), 0, 1)
    axis.scatter(*points[:3000].T, s=4, color="#3b6ea5", alpha=shown, linewidths=0)
    axis.plot(*here[0], "x", color="black", markersize=8)
    axis.plot(*guess[0], "*", color="#d1495b", markersize=12)
plt.show()

# %% [markdown]
# ## 3. Learning it
#
# With a set of points one can sum over them all. For pictures never seen before, a network learns
# the guess: take a point, a time and noise, mix them, let it say the velocity $x - e$, and pull
# what it says towards the truth (*flow matching*). Nobody ever tells it the mean; but the mean has
# the least squared error.
#
# Ours has 37,000 weights. It is told which part of the face the point is of, and one time in five
# it is not, so that it can do both: we shall need that for guidance.

# %%
WIDTH, STEPS, BATCH = 128, 4000, 512


def init(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Matrices and biases of four layers."""
    sizes = (2 + 12 + 8 + 3, WIDTH, WIDTH, WIDTH, 2)
    keys = jax.random.split(key, 4)
    return [
        (jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def velocity(params, z, t, hint):
    """What the network says of z [B, 2] at times t [B], told parts as [B, 3] or zeros."""
    clock = jnp.pi * t[:, None] * 2.0 ** jnp.arange(4)
    waves = jnp.concatenate([z, 2 * z, 4 * z, clock], -1)  # they tell what is near apart
    h = jnp.concatenate([z, jnp.sin(waves), jnp.cos(waves), hint], -1)
    for weight, bias in params[:-1]:
        h = jax.nn.silu(h @ weight + bias)
    return h @ params[-1][0] + params[-1][1]


def loss(params, key):
    pick, mix, times, drop = jax.random.split(key, 4)
    rows = jax.random.randint(pick, (BATCH,), 0, len(points))
    x, e = jnp.asarray(points)[rows], jax.random.normal(mix, (BATCH, 2))
    t = jax.random.uniform(times, (BATCH,))
    hint = jax.nn.one_hot(jnp.asarray(parts)[rows], 3)
    hint *= jax.random.bernoulli(drop, 0.8, (BATCH, 1))
    z = t[:, None] * x + (1 - t[:, None]) * e
    return ((velocity(params, z, t, hint) - (x - e)) ** 2).sum(-1).mean()


optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, STEPS))


@jax.jit
def train(params, key):
    """Takes all the steps: the weights, and the loss of each step."""

    def step(state, key):
        params, memory = state
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), value

    state = (params, optimizer.init(params))
    (params, _), values = jax.lax.scan(step, state, jax.random.split(key, STEPS))
    return params, values


first = init(jax.random.key(0))
params, losses = train(first, jax.random.key(1))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} weights, {STEPS} steps")

# %% [markdown]
# The loss falls and then stays: most of it is not the network's fault. That no guess can know which
# point it was costs so much at each time (grey); the network comes close to it.

# %%
fresh, _ = face(rng, 1000)
extra = rng.standard_normal(fresh.shape).astype(np.float32)
none = jnp.zeros((len(fresh), 3))
times = np.linspace(0.02, 0.9, 9)
ours, least = [], []
for t in times:
    z = (t * fresh + (1 - t) * extra).astype(np.float32)
    said = velocity(params, z, jnp.full(len(z), t), none)
    guess, _ = best_guess(z, t)
    best = schedule.target("flow", guess, (z - t * guess) / (1 - t), schedule.from_flow(t))
    ours.append(float(((said - (fresh - extra)) ** 2).sum(-1).mean()))
    least.append(float(((best - (fresh - extra)) ** 2).sum(-1).mean()))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
left.plot(np.convolve(losses, np.ones(50) / 50, "valid"))
left.set(title="Loss by step, told the part four times in five", xlabel="step")
right.plot(times, least, color="#bbbbbb", linewidth=5, label="the best guess")
right.plot(times, ours, label="the network")
right.set(title="Loss by time, not told", xlabel="t", ylim=(0, None))
right.legend()
plt.show()

# %% [markdown]
# ## 4. A field of arrows
#
# So at every place and time the network names a velocity. To draw, set points down at random and
# let them go with the arrows, from $t = 0$ to $1$. Above, the arrows at four times, and where the
# points then are; below, the ways that some take. They begin straight, towards the middle, and turn
# when they see where the face is.


# %%
def denoiser(part: int | None = None, scale: float = 1.0) -> sample.DenoiseFn:
    """The network as a sampler asks it: for the clean points, of a part of the face or any."""

    @jax.jit
    def clean(z, t):
        time = jnp.full(len(z), t)
        level = NoiseLevel(t, 1 - t)
        nothing = jnp.zeros((len(z), 3))
        without = schedule.clean("flow", velocity(params, z, time, nothing), z, level)
        if part is None:
            return without
        hint = nothing.at[:, part].set(1)
        with_part = schedule.clean("flow", velocity(params, z, time, hint), z, level)
        return sample.classifier_free_guidance(with_part, without, scale)

    return lambda z, level: clean(z, level.alpha)


start = jnp.asarray(rng.standard_normal((2000, 2)), jnp.float32)
walk = [start]
walk += [step.noisy for step in sample.steps(denoiser(), start, schedule.flow_levels(100), "euler")]
walk = np.stack(walk)  # [101, N, 2]

grid = np.linspace(-1.8, 1.8, 19, dtype=np.float32)
places = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
figure, axes = plt.subplots(2, 4, figsize=(10, 5.2), layout="constrained")
for axis, below, t in zip(axes[0], axes[1], (0.0, 0.4, 0.7, 0.9), strict=True):
    time, nothing = jnp.full(len(places), t), jnp.zeros((len(places), 3))
    arrows = np.asarray(velocity(params, places, time, nothing))
    now = round(100 * t)
    plane(axis, walk[now], f"t = {t}", "#e8a33d")
    axis.quiver(*places.T, *arrows.T, color="#3b6ea5", angles="xy", scale=40, width=0.004)
    until = {0: 25, 40: 50, 70: 75, 90: 100}[now]
    plane(below, walk[until, :1], f"from t = 0 to {until / 100}")
    for one in range(60):
        below.plot(*walk[: until + 1, one].T, color="#3b6ea5", linewidth=0.5)
    below.plot(*walk[until, :60].T, ".", color="#d1495b", markersize=3)
plt.show()

# %% [markdown]
# ## 5. Few steps
#
# A hundred small steps follow the arrows well. But each asks the network, and for pictures that is
# all the time there is. So samplers differ in what they do with few. *Euler* walks straight on.
# *DDPM* throws part of the noise away at each step and draws fresh noise. *Heun* looks at the end
# of the step too, and takes the mean of both arrows (so it asks twice). *DPM-Solver++* remembers
# the last guess, and goes on as it was changing. They share one loop (`diffusion/sample.py`).

# %%
COUNTS = (2, 4, 8, 16)
keys = sample.image_keys(0, len(start))
far = {}
figure, axes = plt.subplots(4, 4, figsize=(7.2, 7.4), layout="constrained")
for row, rule in zip(axes, ("euler", "ddpm", "heun", "dpmpp"), strict=True):
    for axis, count in zip(row, COUNTS, strict=True):
        levels = schedule.flow_levels(count // 2 if rule == "heun" else count)
        drawn = np.asarray(sample.sample(denoiser(), start, levels, rule, keys=keys))
        nearest = np.sqrt(((drawn[:, None] - points[None, :3000]) ** 2).sum(-1).min(1))
        far[rule, count] = float(nearest.mean())
        plane(axis, drawn, f"{rule}, asked {count} times")
plt.show()
for rule in ("euler", "ddpm", "heun", "dpmpp"):
    print(f"{rule:6} mean distance from the face:", *(f"{far[rule, c]:.3f}" for c in COUNTS))

# %% [markdown]
# ## 6. Guidance
#
# Told "mouth", the network says other arrows than when told nothing. The difference is what the
# word adds, and *guidance* multiplies it:
# $\hat x = \hat x_{\text{without}} + s\,(\hat x_{\text{with}} - \hat x_{\text{without}})$.
# At $s = 1$ it draws mouths as they are; at 3 it leaves out the ends, which are near the outline,
# and at 7 all but the middle: what is most a mouth, and least anything else. So it is with
# pictures: with some guidance one can tell better what they show, and they have less variety.

# %%
SCALES = (0.0, 1.0, 3.0, 7.0)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), layout="constrained")
spread = {}
for axis, scale in zip(axes, SCALES, strict=True):
    denoise = denoiser(PARTS.index("mouth"), scale)
    drawn = np.asarray(sample.sample(denoise, start, schedule.flow_levels(40), "heun"))
    spread[scale] = float(drawn[:, 0].std())
    plane(axis, points[:3000], color="#dddddd")
    plane(axis, drawn, f'"mouth", guidance {scale:.0f}', COLORS[2])
plt.show()

# %% [markdown]
# ## 7. Pictures
#
# emoji-64 is the same with 3,072 values in place of two (32 x 32 pixels of three colours; a small
# second network doubles them), a U-Net of 7 million weights in place of four layers, and the words
# of a prompt, as an encoder of sentences reads them, in place of three parts. `Painter.steps` gives
# the noisy picture after each step and the one the network saw behind it: first an apple in
# general, in glaring colours, then this one.

# %%
folder = download.find_path(catalogue.load().models["all-minilm-l6-v2"], settings.data_folder())
emoji = diffusion.load(diffusion.weights_folder("emoji-64"), folder)
WORDS = ("red apple", "cat", "sun", "heart", "pizza", "tree", "fish", "smiling face")
prompts = [f"{word}, flat style" for word in WORDS]
keys = sample.image_keys(0, len(prompts))
walk = list(emoji.steps(prompts, keys, diffusion.SamplerOptions(guidance=3)))


def show(pictures: np.ndarray, columns: int, rows: list[str] | None = None, top=()) -> None:
    """Pictures, uint8 [B, Y, X, C], as a sheet with words beside and above it."""
    height, width = pictures.shape[1:3]
    lines = len(pictures) // columns
    figure, axes = plt.subplots(figsize=(10, 10 * lines * height / columns / width + 0.3))
    axes.imshow(pipeline.make_grid(pictures, columns))
    axes.set_yticks(height * (np.arange(lines) + 0.5), rows or [""] * lines)
    axes.set_xticks(width * (np.arange(columns) + 0.5), top or [""] * columns)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    plt.show()


show(emoji.trajectory_images(walk, row=0), 8, ["noisy", "seen in it"])

# %% [markdown]
# **Guidance**, from the same noise. With more of it, colours get stronger. The network knows these
# plain words well, so that outlines need little of it.

# %%
drawn = {3: emoji.postprocess(walk[-1][0])}
for scale in (1, 7):
    drawn[scale] = emoji.generate(prompts, seed=0, options=diffusion.SamplerOptions(guidance=scale))
show(np.concatenate([drawn[scale] for scale in (1, 3, 7)]), 8, ["1", "3", "7"], WORDS)

# %% [markdown]
# **Seeds.** Other noise, another picture; the same noise, the same picture to the bit. And as each
# picture has noise of its own, it does not matter what is drawn beside it.

# %%
seeds = emoji.generate([prompts[7]] * 8, seed=7)
again = emoji.generate([prompts[7]] * 4 + prompts[:4], seed=7)
show(seeds, 8)
print(f"with the same seed, the same pictures: {(seeds[:4] == again[:4]).all()}")

# %% [markdown]
# **An edit.** The lower half of a face is made transparent, which says: draw this. At every level
# of noise the known half is put back with as much noise, so that the network sees it beside what it
# draws, and fits the one to the other. In the end, what was opaque is laid over it, bit by bit.

# %%
whole = drawn[3][7]
half = np.concatenate([whole, np.full((64, 64, 1), 255, np.uint8)], -1)
half[36:, :, 3] = 0
mask = edit.alpha_mask(half)
EDIT_PROMPTS = ("smiling face", "sad face", "angry face", "red apple")
how = {
    "pictures": np.stack([edit.preprocess_image(half, 32)] * 8),
    "masks": np.stack([edit.preprocess_mask(mask, 32)] * 8),
}
edit_prompts = [f"{wish}, flat style" for wish in EDIT_PROMPTS]
*_, (last, _) = edit.steps(emoji, 2 * edit_prompts, keys, diffusion.SamplerOptions(), **how)
edited = [edit.paste(whole, one, mask) for one in emoji.postprocess(last)]
kept = edit.paste(whole, np.full_like(whole, 255), mask)
show(np.stack([whole, *edited[:4], kept, *edited[4:]]), 5, top=["before, and kept", *EDIT_PROMPTS])

# %% [markdown]
# **A variation** begins not at noise but at a picture with noise over it. How far back it goes is
# its strength: what the noise has hidden is drawn anew, what it has left stays.

# %%
rows, others = [], sample.image_keys(1, 8)  # other noise than its own
for strength in (0.4, 0.7, 0.9):
    how = {"pictures": np.stack([edit.preprocess_image(whole, 32)] * 8), "strength": strength}
    *_, (last, _) = edit.steps(emoji, ["face"] * 8, others, diffusion.SamplerOptions(), **how)
    rows.append(np.concatenate([whole[None], emoji.postprocess(last)[:7]]))
show(np.concatenate(rows), 8, ["0.4", "0.7", "0.9"], ["from", *[""] * 7])

# %% [markdown]
# ## 8. What we have seen, as assertions

# %%
assert is_same, "notations differ by a scale"
assert all(error < 1e-5 for error in errors.values()), "every prediction is every other"
assert all(a < 1.2 * b for a, b in zip(ours, least, strict=True)), "near the best there can be"
assert far["dpmpp", 8] < far["euler", 8] < far["euler", 2], "memory helps, and so do steps"
assert spread[3.0] < spread[1.0] < spread[0.0], "guidance narrows"
assert (seeds[:4] == again[:4]).all() and (seeds[0] != seeds[1]).any()
assert all((one[:36] == whole[:36]).all() for one in edited), "what was kept is kept"
change = [np.abs(row[1:].astype(float) - row[0]).mean() for row in rows]
other = np.abs(drawn[3][:7].astype(float) - whole).mean()
assert 0 < change[0] < other, "variations differ, but less than other pictures"
print("all true")

# %% [markdown]
# ## Exercises
#
# **1.** DDPM names a level by $\bar\alpha$, with $\alpha = \sqrt{\bar\alpha}$ and $\sigma =
# \sqrt{1 - \bar\alpha}$. At which time of a flow is the ratio of noise to picture the same?


# %% tags=["stub"]
def flow_time(alpha_bar: float) -> float:
    """The time t, 0 to 1, whose (1 - t) / t is DDPM's sigma / alpha."""
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
# **2.** The best guess for numbers in place of pictures: $z = t x + (1 - t) e$, and $x$ was one of
# `known`, each as likely. What is the mean of $x$?


# %% tags=["stub"]
def posterior_mean(z: float, t: float, known: list[float]) -> float:
    """The mean of what could be behind z, for t below 1."""
    ...


checks.report(checks.posterior_mean, posterior_mean)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def posterior_mean(z: float, t: float, known: list[float]) -> float:
#     x = np.array(known)
#     scores = -((z - t * x) ** 2) / (2 * (1 - t) ** 2)
#     weights = np.exp(scores - scores.max())
#     return float((weights * x).sum() / weights.sum())
# ```
# </details>
#
# **3.** Heun's rule. Walk from $t = 0$ to $1$ in equal steps: go to the end of a step with the
# velocity at its begin, look at the velocity there, go back, and take the step with the mean.


# %% tags=["stub"]
def heun(velocity, z: float, steps: int) -> float:
    """Where z is at t = 1; `velocity(z, t)` says where to."""
    ...


checks.report(checks.heun, heun)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def heun(velocity, z: float, steps: int) -> float:
#     for i in range(steps):
#         t, next_t = i / steps, (i + 1) / steps
#         here = velocity(z, t)
#         there = velocity(z + here / steps, next_t)
#         z += (here + there) / 2 / steps
#     return z
# ```
# </details>
#
# Read next: `diffusion/unet.py` for the network, `training/recipes/emoji.py` for how it learnt,
# then `serve/models/images.py` for many who draw at a time.
