"""Text to image: a small diffusion model, its schedules and its samplers.

Reading order: `schedule` (noise levels), `layers` and `unet` (the denoising network), `model`
(preconditioning and loss), `sample` (samplers and guidance), `text` (the prompt encoder),
`pipeline` (prompt to image), `edit` (image to image, inpainting), `upscale`. `dit` is an
alternative to the U-Net, `data` the training data of emoji-64, `metrics` the evaluation, `config`
the sizes of the networks, `checkpoint` their files, and `image_io` reads and writes image files.

    import diffusion

    pipeline = diffusion.load(diffusion.weights_folder(), "models/all-minilm-l6-v2")
    images = pipeline.generate(["a red apple", "a happy cat"], seed=0)  # uint8 [2, 64, 64, 3]

JAX is imported on first use, so that commands that only need `weights_folder` start fast.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.pipeline import DiffusionPipeline, SamplerOptions, load

__all__ = ["DiffusionPipeline", "SamplerOptions", "load", "weights_folder"]


def weights_folder(name: str = "emoji-64") -> Path:
    """Return the folder of a model that is part of this package.

    Args:
        name: the name of the model.

    Raises:
        FileNotFoundError: this copy of the package does not have the model.
    """
    folder = Path(__file__).parent / "weights" / name
    if not (folder / "denoiser" / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: this copy of Pellucid does not include {name}")
    return folder


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffusion import pipeline

    return getattr(pipeline, name)
