"""A data folder of an old version, which later versions must open: see `make_old_home.py`."""
