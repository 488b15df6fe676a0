"""Write the reference values of torch: gradients, and a loss curve of twenty steps.

    python make_training.py

It needs torch and transformers (`pip install -e '.[parity]'`), and uses the tiny decoders of
../transformer. It writes:

    FAMILY/     the gradients of a weighted sum of next-token losses, saved by transformers in place
                of the weights, and batch.npz with ids [2, T], weights [2, T] and the loss
    curve/      the weights after the last step, and curve.npz with ids [STEPS, 4, T],
                weights [STEPS, 4, T], the mean losses [STEPS], the norms of the gradients before
                clipping [STEPS] and the learning rates [STEPS]
    versions    in each npz, the versions of the packages

Texts are cumulative sums of small random numbers, which a model can learn.
"""

import math
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
TINY = HERE.parent / "transformer"
FAMILIES = ("gpt2", "llama", "gemma3")
LENGTH, STEPS, WARMUP, RATE, FINAL, DECAY, CLIP = 24, 20, 4, 3e-3, 0.1, 0.1, 1.0
VERSIONS = np.array(
    [f"Python {platform.python_version()}"]
    + [f"{name} {version(name)}" for name in ("torch", "transformers", "numpy")]
)


def load(family: str):
    return transformers.AutoModelForCausalLM.from_pretrained(
        TINY / family, attn_implementation="eager", dtype=torch.float32
    ).train()


def make_batch(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.cumsum(rng.integers(0, 3, (rows, LENGTH)), axis=1) % 96
    weights = np.where(rng.random((rows, LENGTH)) < 0.3, 0.0, rng.choice([1.0, 0.5], (rows, 1)))
    return ids.astype(np.int32), weights.astype(np.float32)


def losses(model, ids: np.ndarray, weights: np.ndarray) -> tuple[torch.Tensor, float]:
    """Return the weighted sum of the losses of tokens after the first, and that of the weights."""
    ids, weights = torch.from_numpy(ids).long(), torch.from_numpy(weights)[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    return (each * weights).sum(), float(weights.sum())


def gradients(family: str) -> None:
    model = load(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, weights = make_batch(np.random.default_rng(0), 2)
    loss, _ = losses(model, ids, weights)
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(HERE / family)
    np.savez(HERE / family / "batch.npz", ids=ids, weights=weights, loss=loss.item(),
             versions=VERSIONS)  # fmt: skip


def rate(step: int) -> float:
    if step < WARMUP:
        return RATE * (step + 1) / (WARMUP + 1)
    cosine = math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))
    return RATE * (FINAL + (1 - FINAL) * (1 + cosine) / 2)


def curve() -> None:
    model = load("llama")
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == has_decay],
         "weight_decay": DECAY * has_decay}
        for has_decay in (True, False)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rng = np.random.default_rng(1)
    batches = [make_batch(rng, 4) for _ in range(STEPS)]
    records = []
    for step, (ids, weights) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss, weight = losses(model, ids, weights)
        loss = loss / weight
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        records.append((loss.item(), norm.item(), rate(step)))
    model.save_pretrained(HERE / "curve")
    means, norms, rates = np.array(records).T
    np.savez(
        HERE / "curve" / "curve.npz",
        ids=np.stack([ids for ids, _ in batches]),
        weights=np.stack([weights for _, weights in batches]),
        losses=means, norms=norms, rates=rates, versions=VERSIONS,
    )  # fmt: skip


if __name__ == "__main__":
    for family in FAMILIES:
        gradients(family)
    curve()
