"""The door for people with a Trainer: flags, mixin, callback."""
