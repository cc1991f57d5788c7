"""Tokens: documents, what a caller says of a batch, packing, masks and bands."""
