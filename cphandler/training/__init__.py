"""Training: batches and losses under context parallelism."""
