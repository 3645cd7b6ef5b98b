"""The paper's pass before training: which samples, their gradients, the sums of these over batches and processes."""
