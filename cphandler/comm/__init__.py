"""Communication: collectives, groups, and the check that all ranks hold one batch."""
