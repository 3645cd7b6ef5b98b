"""Watches what v0 does to a run's steps, without changing them."""
