"""Plans: layout x mask to tasks, what travels for them, and what they cost."""
