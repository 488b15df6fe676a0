"""Inspect a decoder on the command line: attention maps, logit lens, alternatives, head effects.

    python -m transformer attention MODEL ID ... --layer 3 -o attention.png
    python -m transformer lens MODEL ID ...
    python -m transformer alternatives MODEL ID ...
    python -m transformer heads MODEL ID ...

MODEL is a GGUF file or a Hugging Face folder, and ID is a token id. The results of
`transformer.interpret` are printed as numbers; `-o` also draws them. `pellucid inspect` takes text
instead of ids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 after printing an error.

    Args:
        argv: The arguments, without the program name; None takes those of the process.
    """
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
    ids, labels = args.ids, [str(id) for id in args.ids]
    if args.command == "attention":
        maps = np.asarray(interpret.attention(params, cfg, ids))
        if not 0 <= args.layer < cfg.num_layers:
            raise ValueError(f"--layer must be from 0 to {cfg.num_layers - 1}, got {args.layer}")
        for head, rows in enumerate(maps[args.layer]):
            print(f"layer {args.layer} head {head}")
            print(
                "\n".join(" ".join(f"{x:.3f}" for x in row[: i + 1]) for i, row in enumerate(rows))
            )
        if args.output:
            plots.attention(maps, labels, args.layer, args.output)
    elif args.command == "lens":
        lens = interpret.logit_lens(params, cfg, ids)
        top_ids = np.asarray(lens.ids)[..., 0]
        for depth, row in enumerate(top_ids):
            print(depth, *row)
        if args.output:
            plots.logit_lens(lens, labels, top_ids.astype(str).tolist(), args.output)
    elif args.command == "alternatives":
        result = interpret.alternatives(params, cfg, ids, args.top)
        top_probs = np.exp(np.asarray(result.top_logprobs))
        for t, id in enumerate(ids[1:]):
            likely = " ".join(
                f"{other}:{prob:.3f}"
                for other, prob in zip(result.top_ids[t].tolist(), top_probs[t], strict=True)
            )
            print(
                f"{id} probability {np.exp(result.token_logprobs[t]):.4f} rank {result.rank[t]} "
                f"entropy {result.entropy[t]:.2f} bits; {likely}"
            )
        if args.output:
            top_labels = np.asarray(result.top_ids).astype(str).tolist()
            plots.alternatives(result, labels, top_labels, args.output)
    else:
        effects = np.asarray(interpret.head_effects(params, cfg, ids))
        for layer, row in enumerate(effects):
            print(layer, *(f"{x:+.4f}" for x in row))
        if args.output:
            plots.head_effects(effects, args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m transformer", description="Inspect the intermediates of a decoder."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("attention", "attention weights of each head of a layer"),
        ("lens", "most likely next token after each layer (logit lens)"),
        ("alternatives", "most likely tokens at each position"),
        ("heads", "increase of the loss without each head"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("model", type=Path, help="a GGUF file or a Hugging Face folder")
        command.add_argument("ids", type=int, nargs="+", metavar="ID", help="token ids")
        command.add_argument("-o", "--output", type=Path, help="draw the result into this PNG file")
        if name == "attention":
            command.add_argument("--layer", type=int, default=0, help="layer, counted from 0")
        if name == "alternatives":
            command.add_argument("--top", type=int, default=5, help="tokens to list per position")
    return parser


if __name__ == "__main__":
    sys.exit(main())
