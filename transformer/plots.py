"""Pictures of what `inspect.py` returns, as PNG files or on axes of your own.

Tokens are labelled with whatever strings are given: this package knows ids, not text. A missing
folder is made once there is a picture to put in it. matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer.interpret import Alternatives, LogitLens

MAX_TOKENS = 48  # more do not fit into a picture that one can read


def attention(maps: np.ndarray, tokens: Sequence[str], layer: int, path: str | Path) -> None:
    """The heads of one layer: a square each, a row for each token that looks.

    Args:
        maps: [L, N, T, T], as `inspect.attention` gives them.
        tokens: T labels.
        layer: which, from 0.
        path: where the PNG goes.

    Raises:
        ValueError: there is no such layer, or too many tokens to draw.
    """
    maps = np.asarray(maps)
    _check(tokens, maps.shape[2])
    if not 0 <= layer < len(maps):
        raise ValueError(f"there is no layer {layer}: they go from 0 to {len(maps) - 1}")
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
        # A square root, so that small weights can be seen beside those of 1.
        axis.imshow(np.sqrt(maps[layer, head]), cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"head {head}", fontsize=9)
        _label(axis, tokens)
        axis.tick_params(labelbottom=True)
    figure.suptitle(f"Layer {layer}: each row looks at the columns (square root of the weight)")
    _save(figure, path)


def logit_lens(
    result: LogitLens, tokens: Sequence[str], labels: Sequence[Sequence[str]], path: str | Path
):
    """The likeliest next token after each layer, the last layer on top; darker is surer.

    Args:
        found: as `inspect.lens` gives it.
        tokens: T labels of the text.
        said: [L + 1][T], labels of `found.ids[..., 0]`.
        path: where the PNG goes.

    Raises:
        ValueError: there are too many tokens to draw.
    """
    chances = np.exp(np.asarray(result.logprobs)[..., 0])
    _check(tokens, chances.shape[1])
    depth = len(chances)
    figure, axis = _plt().subplots(
        figsize=(1.5 + 0.85 * len(tokens), 1.2 + 0.24 * depth), layout="constrained"
    )
    picture = axis.imshow(chances, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for row in range(depth):
        for column in range(len(tokens)):
            axis.text(
                column, row, _clip(labels[row][column]), ha="center", va="center", fontsize=7,
                color="white" if chances[row, column] > 0.6 else "black",
            )  # fmt: skip
    axis.set_xticks(range(len(tokens)), [_clip(token) for token in tokens], fontsize=8)
    step = max(1, depth // 12)
    axis.set_yticks(range(0, depth, step), ["input", *range(1, depth)][::step], fontsize=8)
    axis.set_ylabel("after layer")
    axis.set_xlabel("having read up to")
    figure.colorbar(picture, label="probability", shrink=0.8)
    figure.suptitle("What each layer would say next (logit lens)")
    _save(figure, path)


def alternatives(
    result: Alternatives, tokens: Sequence[str], likely: Sequence[Sequence[str]], path: str | Path
) -> None:
    """For each token how open the choice was, and what was likeliest in its place.

    Args:
        found: as `inspect.alternatives` gives it.
        tokens: T labels of the text; the first has no alternatives.
        likely: [T - 1][k], labels of `found.ids`.
        path: where the PNG goes.

    Raises:
        ValueError: there are too many tokens to draw.
    """
    _check(tokens, len(result.token_logprobs) + 1)
    chosen, entropy = np.exp(np.asarray(result.token_logprobs)), np.asarray(result.entropy)
    chances = np.exp(np.asarray(result.top_logprobs))
    rows = np.arange(len(chosen))
    figure, (left, right) = _plt().subplots(
        1, 2, figsize=(11, 1.2 + 0.3 * len(chosen)), sharey=True, layout="constrained",
        gridspec_kw={"width_ratios": [2, 5]},
    )  # fmt: skip
    left.barh(rows, entropy, color="#b8c9dc")
    left.set_xlabel("entropy, bits")
    left.set_yticks(rows, [_clip(token, 16) for token in tokens[1:]], family="monospace")
    left.invert_yaxis()
    begin = np.zeros(len(rows))
    for place in range(chances.shape[1]):
        is_it = [likely[row][place] == tokens[row + 1] for row in rows]
        colours = ["#3b6ea5" if it else "#e3e7ec" for it in is_it]
        right.barh(rows, chances[:, place], left=begin, color=colours, edgecolor="white")
        for row in rows:
            if chances[row, place] > 0.06:
                right.text(
                    begin[row] + chances[row, place] / 2, row,
                    _clip(likely[row][place], int(chances[row, place] * 70)),
                    ha="center", va="center", fontsize=8, color="white" if is_it[row] else "black",
                )  # fmt: skip
        begin += chances[:, place]
    for row in rows:
        right.text(
            1.01, row, f"{chosen[row]:.2g}, rank {result.rank[row]}", va="center", fontsize=8
        )
    right.set_xlim(0, 1.2)
    right.set_xlabel("probability of what was likeliest; blue is what stands there")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def head_effects(effects: np.ndarray, path: str | Path) -> None:
    """What each head is worth: red where the model misses it, blue where it is better without.

    Args:
        effects: [L, N], as `inspect.head_effects` gives them.
        path: where the PNG goes.
    """
    effects = np.asarray(effects)
    depth, num_heads = effects.shape
    limit = max(float(np.abs(effects).max()), 1e-9)
    figure, axis = _plt().subplots(
        figsize=(2.5 + 0.4 * num_heads, 1.5 + 0.22 * depth), layout="constrained"
    )
    picture = axis.imshow(
        effects, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower"
    )
    axis.set_xticks(range(num_heads))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    figure.colorbar(picture, label="more nats a token without it")
    figure.suptitle("What each head is worth on this text")
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
        raise ValueError(f"there must be {expected} labels, one a token; got {len(tokens)}")
    if expected > MAX_TOKENS:
        raise ValueError(f"{expected} tokens cannot be drawn legibly: take at most {MAX_TOKENS}")


def _label(axis: Any, tokens: Sequence[str]) -> None:
    names = [_clip(token) for token in tokens]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)


def _clip(text: str, width: int = 9) -> str:
    """A label: blanks made visible, no dollar signs (they would begin a formula), not too long."""
    text = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
    return text if len(text) <= width else text[: max(width - 1, 1)] + "…"
