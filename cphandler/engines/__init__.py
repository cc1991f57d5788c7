"""Engines: packages that compute attention, its exchange included, behind a handler; imported when first used."""
