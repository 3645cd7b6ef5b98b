"""E[g^2]: of single samples by a pass before training, its form while v0 decays; and the trust radius."""
