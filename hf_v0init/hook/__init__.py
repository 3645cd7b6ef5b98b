"""v0 on an optimizer: the hook, the two ways in which v0 decays, and the length that is measured in the first step."""

from .attach import attach_v0
from .length import call_before_first_update, find_largest_rate, measure_length, measure_trust_radius
from .v0_hook import V0Hook, find_hook

__all__ = [
    "V0Hook",
    "attach_v0",
    "call_before_first_update",
    "find_hook",
    "find_largest_rate",
    "measure_length",
    "measure_trust_radius",
]
