"""What programs that use Pellucid depend on, written down: see `record.py`."""
