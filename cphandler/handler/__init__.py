"""Handlers: the contract, the class that derives it from a layout, capabilities, and classes by name."""
