"""Integrations: the stacks people train with, given a handler; each imports its stack when it is used."""
