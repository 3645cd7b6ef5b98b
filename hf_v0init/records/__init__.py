"""What a run leaves on disk: v0_init.json, the model card, its log, marks of valid checkpoints."""
