"""Text to image: a small diffusion model, its schedules and its samplers.

Read in this order: `schedule` (what noise is), `layers` and `unet` (a network that sees the picture
behind it), `model` (how it is asked), `sample` (from noise to a picture), `text` (what a prompt
means), `painter` (all of it together), `edit` (from a picture to another), `upscale`; `dit` is the
other network, `data` the pictures that emoji-64 has learnt from, `config` the sizes, `checkpoint`
the network's files, `picture` those that people send.

    import diffusion

    painter = diffusion.load(diffusion.weights_folder(), "models/all-minilm-l6-v2")
    pictures = painter.draw(["a red apple", "a happy cat"], seed=0)  # uint8 [2, 64, 64, 3]

What needs JAX is imported when it is first asked for, because a command that only wants to know
where the weights are should not wait for it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.pipeline import DiffusionPipeline, SamplerOptions, load

__all__ = ["DiffusionPipeline", "SamplerOptions", "load", "weights_folder"]


def weights_folder(name: str = "emoji-64") -> Path:
    """The folder of a model that comes with this package.

    Raises:
        FileNotFoundError: it does not come with this copy of the package.
    """
    folder = Path(__file__).parent / "weights" / name
    if not (folder / "denoiser" / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: the weights of {name} are not in this copy of Pellucid")
    return folder


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffusion import pipeline

    return getattr(pipeline, name)
