"""Draws: `python -m diffusion --encoder FOLDER "a red apple" --out apple.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from diffusion import image_io, sample, weights_folder
from diffusion import pipeline as painters
from diffusion.pipeline import SamplerOptions


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 1 if something could not be read."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion", description="Draws small pictures."
    )
    parser.add_argument("--model", type=Path, help="denoiser/ and upscaler/ [default: emoji-64]")
    parser.add_argument("--encoder", required=True, type=Path, help="all-minilm-l6-v2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=1, metavar="N", help="pictures of each prompt")
    parser.add_argument("--steps", type=int, default=SamplerOptions.steps)
    parser.add_argument("--rule", choices=sample.SAMPLERS, default=SamplerOptions.sampler)
    parser.add_argument("--guidance", type=float, default=SamplerOptions.guidance)
    parser.add_argument(
        "--strip", action="store_true", help="how the picture comes: noisy above, predicted below"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="PNG")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    args = parser.parse_args(argv)
    try:
        plan = SamplerOptions(steps=args.steps, sampler=args.rule, guidance=args.guidance)
        painter = painters.load(args.model or weights_folder(), args.encoder)
        rows = []
        for prompt in args.prompts:
            keys = sample.image_keys(args.seed, args.n)
            steps = list(painter.steps([prompt] * args.n, keys, plan))
            if args.strip:
                rows += np.split(painter.trajectory_images(steps), 2)
            else:
                rows.append(painter.postprocess(steps[-1][0]))
        image_io.save(painters.make_grid(np.concatenate(rows), len(rows[0])), args.out)
    except (OSError, ValueError) as error:
        print(f"python -m diffusion: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
