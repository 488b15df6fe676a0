"""Command line of image generation.

python -m diffusion --encoder FOLDER "a red apple" --out apple.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from diffusion import image_io, pipeline, sample, weights_folder
from diffusion.pipeline import SamplerOptions


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 1 if a file could not be read or written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m diffusion", description="Generate images of 64 x 64 pixels from prompts."
    )
    parser.add_argument(
        "--model", type=Path, help="folder with denoiser/ and upscaler/ [default: emoji-64]"
    )
    parser.add_argument("--encoder", required=True, type=Path, help="folder of all-minilm-l6-v2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images per prompt")
    parser.add_argument("--steps", type=int, default=SamplerOptions.steps)
    parser.add_argument("--sampler", choices=sample.SAMPLERS, default=SamplerOptions.sampler)
    parser.add_argument(
        "--rule", dest="sampler", choices=sample.SAMPLERS, help=argparse.SUPPRESS
    )  # former name, still accepted
    parser.add_argument("--guidance", type=float, default=SamplerOptions.guidance)
    parser.add_argument(
        "--trajectory",
        action="store_true",
        help="write the noisy image of every step, and below it the clean image predicted there",
    )
    parser.add_argument(
        "--strip", dest="trajectory", action="store_true", help=argparse.SUPPRESS
    )  # former name, still accepted
    parser.add_argument("--out", required=True, type=Path, metavar="PNG")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    args = parser.parse_args(argv)
    try:
        options = SamplerOptions(steps=args.steps, sampler=args.sampler, guidance=args.guidance)
        model = pipeline.load(args.model or weights_folder(), args.encoder)
        rows = []
        for prompt in args.prompts:
            keys = sample.image_keys(args.seed, args.n)
            steps = list(model.steps([prompt] * args.n, keys, options))
            if args.trajectory:
                rows += np.split(model.trajectory_images(steps), 2)
            else:
                rows.append(model.postprocess(steps[-1][0]))
        image_io.save(pipeline.make_grid(np.concatenate(rows), len(rows[0])), args.out)
    except (OSError, ValueError) as error:
        print(f"python -m diffusion: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
