"""The GPU check: see `benchmarks/gpu/__main__.py`."""
