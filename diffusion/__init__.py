"""Text to image: a small diffusion model, its schedules and its samplers.

Read in this order: `schedule` (what noise is), `layers` and `unet` (a network that sees the picture
behind it), `model` (how it is asked), `sample` (from noise to a picture), `text` (what a prompt
means), `painter` (all of it together), `upscale`; `dit` is the other network, `data` the pictures
that emoji-64 has learnt from, `config` the sizes, `checkpoint` the files.

    import diffusion

    painter = diffusion.load("emoji-64", "models/all-minilm-l6-v2")
    pictures = painter.draw(["a red apple", "a happy cat"], seed=0)  # uint8 [2, 64, 64, 3]
"""

from diffusion.painter import Painter, Plan, load

__all__ = ["Painter", "Plan", "load"]
