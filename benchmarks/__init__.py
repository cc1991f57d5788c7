"""Measurements: each script checks its results before it times them."""
