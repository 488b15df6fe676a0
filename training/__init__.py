"""Examples to weights: the package for data, losses, optimisers, LoRA and recipes.

Nothing is here yet: this version of Pellucid cannot train.
"""
