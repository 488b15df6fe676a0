"""Recipes: short files that combine a model, data and the training loop, to copy and change."""
