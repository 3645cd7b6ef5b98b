"""Translation from scratch or from a pretrained model: pairs, model, metrics."""
