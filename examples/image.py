"""Generate an image: `python examples/image.py ALL_MINILM_FOLDER "a red apple" apple.png`."""

import sys

from PIL import Image

import diffusion

encoder, prompt, path = sys.argv[1:]
pipeline = diffusion.load(diffusion.weights_folder(), encoder)
images = pipeline.generate([prompt], seed=0)  # uint8 [1, 64, 64, 3]
Image.fromarray(images[0]).save(path)
