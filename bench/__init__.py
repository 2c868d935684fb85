"""Measurements of taskd: `python -m bench` (`make bench`). Loopback only, bounded, leaves nothing behind."""
