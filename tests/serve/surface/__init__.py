"""Recorded interfaces of Pellucid, on which other programs depend; see `record.py`."""
