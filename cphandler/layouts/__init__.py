"""Layouts: which rank holds which tokens, and the planner of ``balanced``."""
