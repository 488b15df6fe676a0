"""Text to image: the package for a small diffusion model, its schedule and its samplers.

Nothing is here yet: this version of Pellucid cannot draw.
"""
