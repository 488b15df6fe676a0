"""A data folder as Pellucid left it, which later versions must open: see `make_old_home.py`."""
