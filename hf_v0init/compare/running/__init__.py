"""Trains the runs of a comparison, each a process of its own."""
