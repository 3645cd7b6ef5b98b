"""The strategies (eqs. 10 and 11), the estimate, and its writing into the optimizer at the first step. Knows no Trainer."""
