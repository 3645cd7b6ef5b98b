"""Formulas alone: the multiplier m(t), its lengths, the default scales. Imports no torch."""
