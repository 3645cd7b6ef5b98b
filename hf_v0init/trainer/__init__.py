"""The door for people with a Trainer: flags, mixin, callback."""

from .tested_versions import warn_of_untested_transformers

warn_of_untested_transformers()
