"""All that `hf-v0init` answers."""
