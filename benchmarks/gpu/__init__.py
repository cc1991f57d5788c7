"""What a machine with a GPU is asked: whether every kernel is exact there, and how fast. Needs torch and pydantic."""
