"""A decoder's insides from the command line, by token ids: this package knows no text.

    python -m transformer attention MODEL ID ... --layer 3 -o attention.png
    python -m transformer lens MODEL ID ...
    python -m transformer alternatives MODEL ID ...
    python -m transformer heads MODEL ID ...

MODEL is a GGUF file or a Hugging Face folder. What is found is printed as numbers; with `-o` it is
drawn as well. `pellucid inspect` does the same for text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"python -m transformer: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    from transformer import checkpoint, interpret, plots

    params, cfg, _ = checkpoint.load(args.model)
    ids, names = args.ids, [str(id) for id in args.ids]
    if args.what == "attention":
        maps = np.asarray(interpret.attention(params, cfg, ids))
        if not 0 <= args.layer < cfg.num_layers:
            raise ValueError(f"--layer must be from 0 to {cfg.num_layers - 1}, got {args.layer}")
        for head, rows in enumerate(maps[args.layer]):
            print(f"layer {args.layer} head {head}")
            print(
                "\n".join(" ".join(f"{x:.3f}" for x in row[: i + 1]) for i, row in enumerate(rows))
            )
        if args.output:
            plots.attention(maps, names, args.layer, args.output)
    elif args.what == "lens":
        found = interpret.logit_lens(params, cfg, ids)
        best = np.asarray(found.ids)[..., 0]
        for depth, row in enumerate(best):
            print(depth, *row)
        if args.output:
            plots.logit_lens(found, names, best.astype(str).tolist(), args.output)
    elif args.what == "alternatives":
        found = interpret.alternatives(params, cfg, ids, args.top)
        chances = np.exp(np.asarray(found.top_logprobs))
        for place, id in enumerate(ids[1:]):
            likely = " ".join(
                f"{other}:{chance:.3f}"
                for other, chance in zip(found.top_ids[place].tolist(), chances[place], strict=True)
            )
            print(
                f"{id} probability {np.exp(found.token_logprobs[place]):.4f} rank {found.rank[place]} "
                f"entropy {found.entropy[place]:.2f} bits; {likely}"
            )
        if args.output:
            labels = np.asarray(found.top_ids).astype(str).tolist()
            plots.alternatives(found, names, labels, args.output)
    else:
        effects = np.asarray(interpret.head_effects(params, cfg, ids))
        for layer, row in enumerate(effects):
            print(layer, *(f"{x:+.4f}" for x in row))
        if args.output:
            plots.head_effects(effects, args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m transformer", description="Look inside a decoder."
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in (
        ("attention", "where each head of a layer looks"),
        ("lens", "what each layer would say next"),
        ("alternatives", "what was likely in the place of each token"),
        ("heads", "what each head is worth on these tokens"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("model", type=Path, help="a GGUF file or a Hugging Face folder")
        command.add_argument("ids", type=int, nargs="+", metavar="ID", help="token ids")
        command.add_argument("-o", "--output", type=Path, help="draw it into this PNG file")
        if name == "attention":
            command.add_argument("--layer", type=int, default=0, help="from 0")
        if name == "alternatives":
            command.add_argument("--top", type=int, default=5, help="how many to name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
