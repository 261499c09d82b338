"""Measurements for `scripts/benchmark.py`: each mode yields rows of a table."""
