"""Language modelling: rows, windows, streams, models, perplexity."""
