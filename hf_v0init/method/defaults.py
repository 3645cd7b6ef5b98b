"""The scale of v0 (sigma in eqs. 10 and 11 of arXiv 2412.02153) that holds if none is given: here, and in the paper.

Imports nothing, so that the commands that only calculate start at once.
"""

STRATEGIES = ("zeros", "random", "data_driven", "first_gradient")
SCALED_BY_GRADIENTS = ("data_driven", "first_gradient")  # v0 is a multiple of a mean of g^2

PAPER_SCALE = {"random": 100.0, "data_driven": 1.0}  # its section 4
DEFAULT_SCALE = {"zeros": 0.0, "random": 100.0, "data_driven": 1.0, "first_gradient": 1.0}
MAX_NUM_SAMPLES = 5000  # of the paper's pass
