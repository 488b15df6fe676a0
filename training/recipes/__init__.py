"""Short files that put a model, data and the loop together: to be read, copied and changed."""
