"""Recipes: short training scripts for the models of this project, to copy and change."""
