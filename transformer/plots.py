"""Plots of the results of `interpret.py`, as PNG files.

The caller passes the labels of the tokens, because this package handles token ids only. A missing
output folder is created when the plot is saved. matplotlib is imported only when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer.interpret import Alternatives, LogitLens

MAX_TOKENS = 48  # the labels of more tokens would not be legible


def attention(maps: np.ndarray, tokens: Sequence[str], layer: int, path: str | Path) -> None:
    """Plot the attention weights of one layer: one square per head, with one row per query.

    Args:
        maps: Attention weights of `interpret.attention`, [L, N, T, T].
        tokens: T labels.
        layer: Index of the layer, from 0.
        path: Path of the PNG file.

    Raises:
        ValueError: The layer does not exist, or there are more than MAX_TOKENS tokens.
    """
    maps = np.asarray(maps)
    _check(tokens, maps.shape[2])
    if not 0 <= layer < len(maps):
        raise ValueError(f"layer must be from 0 to {len(maps) - 1}, got {layer}")
    num_heads = maps.shape[1]
    columns = min(range(3, 7), key=lambda n: -num_heads % n) if num_heads > 6 else num_heads
    rows = -(-num_heads // columns)
    side = 1.2 + 0.17 * len(tokens)
    figure, axes = _plt().subplots(
        rows, columns, figsize=(side * columns + 1, side * rows + 0.5), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for head, axis in enumerate(axes.flat):
        if head >= num_heads:
            axis.axis("off")
            continue
        # The square root makes small weights visible.
        axis.imshow(np.sqrt(maps[layer, head]), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"head {head}", fontsize=9)
        _label(axis, tokens)
        axis.tick_params(labelbottom=True)
    figure.suptitle(f"Layer {layer}: attention of queries (rows) to keys (columns), square root")
    _save(figure, path)


def logit_lens(
    result: LogitLens, tokens: Sequence[str], labels: Sequence[Sequence[str]], path: str | Path
) -> None:
    """Plot the most likely next token after each layer, colored by its probability.

    Args:
        result: Result of `interpret.logit_lens`.
        tokens: T labels of the text.
        labels: Labels of `result.ids[..., 0]`, [L + 1][T].
        path: Path of the PNG file.

    Raises:
        ValueError: There are more than MAX_TOKENS tokens.
    """
    probs = np.exp(np.asarray(result.logprobs)[..., 0])
    _check(tokens, probs.shape[1])
    depth = len(probs)
    figure, axis = _plt().subplots(
        figsize=(1.5 + 0.85 * len(tokens), 1.2 + 0.24 * depth), layout="constrained"
    )
    image = axis.imshow(probs, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for row in range(depth):
        for column in range(len(tokens)):
            axis.text(
                column, row, _clip(labels[row][column]), ha="center", va="center", fontsize=7,
                color="white" if probs[row, column] > 0.6 else "black",
            )  # fmt: skip
    axis.set_xticks(range(len(tokens)), [_clip(token) for token in tokens], fontsize=8)
    step = max(1, depth // 12)
    axis.set_yticks(range(0, depth, step), ["input", *range(1, depth)][::step], fontsize=8)
    axis.set_ylabel("after layer")
    axis.set_xlabel("last input token")
    figure.colorbar(image, label="probability", shrink=0.8)
    figure.suptitle("Most likely next token after each layer (logit lens)")
    _save(figure, path)


def alternatives(
    result: Alternatives, tokens: Sequence[str], likely: Sequence[Sequence[str]], path: str | Path
) -> None:
    """Plot the entropy of the prediction and the most likely tokens at each position.

    Args:
        result: Result of `interpret.alternatives`.
        tokens: T labels of the text; the first token has no alternatives.
        likely: Labels of `result.top_ids`, [T - 1][k].
        path: Path of the PNG file.

    Raises:
        ValueError: There are more than MAX_TOKENS tokens.
    """
    _check(tokens, len(result.token_logprobs) + 1)
    token_probs, entropy = np.exp(np.asarray(result.token_logprobs)), np.asarray(result.entropy)
    top_probs = np.exp(np.asarray(result.top_logprobs))
    rows = np.arange(len(token_probs))
    figure, (left, right) = _plt().subplots(
        1, 2, figsize=(11, 1.2 + 0.3 * len(token_probs)), sharey=True, layout="constrained",
        gridspec_kw={"width_ratios": [2, 5]},
    )  # fmt: skip
    left.barh(rows, entropy, color="#b8c9dc")
    left.set_xlabel("entropy, bits")
    left.set_yticks(rows, [_clip(token, 16) for token in tokens[1:]], family="monospace")
    left.invert_yaxis()
    start = np.zeros(len(rows))
    for rank in range(top_probs.shape[1]):
        is_actual = [likely[row][rank] == tokens[row + 1] for row in range(len(rows))]
        colors = ["#3b6ea5" if actual else "#e3e7ec" for actual in is_actual]
        right.barh(rows, top_probs[:, rank], left=start, color=colors, edgecolor="white")
        for row in range(len(rows)):
            if top_probs[row, rank] > 0.06:
                right.text(
                    start[row] + top_probs[row, rank] / 2, row,
                    _clip(likely[row][rank], int(top_probs[row, rank] * 70)),
                    ha="center", va="center", fontsize=8,
                    color="white" if is_actual[row] else "black",
                )  # fmt: skip
        start += top_probs[:, rank]
    for row in rows:
        right.text(
            1.01, row, f"{token_probs[row]:.2g}, rank {result.rank[row]}", va="center", fontsize=8
        )
    right.set_xlim(0, 1.2)
    right.set_xlabel("probability of the most likely tokens; the actual token is blue")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def head_effects(effects: np.ndarray, path: str | Path) -> None:
    """Plot the change of the loss when each head is removed: red for an increase, blue a decrease.

    Args:
        effects: Result of `interpret.head_effects`, [L, N].
        path: Path of the PNG file.
    """
    effects = np.asarray(effects)
    depth, num_heads = effects.shape
    limit = max(float(np.abs(effects).max()), 1e-9)
    figure, axis = _plt().subplots(
        figsize=(2.5 + 0.4 * num_heads, 1.5 + 0.22 * depth), layout="constrained"
    )
    image = axis.imshow(
        effects, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower"
    )
    axis.set_xticks(range(num_heads))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    figure.colorbar(image, label="nats per token")
    figure.suptitle("Increase of the loss without each head")
    _save(figure, path)


def _plt() -> Any:
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _plt().close(figure)


def _check(tokens: Sequence[str], expected: int) -> None:
    if len(tokens) != expected:
        raise ValueError(f"expected {expected} labels, one per token, got {len(tokens)}")
    if expected > MAX_TOKENS:
        raise ValueError(f"at most {MAX_TOKENS} tokens can be drawn, got {expected}")


def _label(axis: Any, tokens: Sequence[str]) -> None:
    labels = [_clip(token) for token in tokens]
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)


def _clip(text: str, width: int = 9) -> str:
    """Return a short label with visible whitespace and escaped dollar signs (math mode)."""
    text = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
    return text if len(text) <= width else text[: max(width - 1, 1)] + "…"
