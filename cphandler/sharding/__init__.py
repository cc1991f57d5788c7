"""Sharding: a rank's shard of a stream of tokens, and moving rows into and out of it."""
