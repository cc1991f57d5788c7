"""Attention: the one loop of exchange x kernel, its options, its calls."""
