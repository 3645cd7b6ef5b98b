"""The one exception for bad input, so that a script can tell it from a defect of ours."""


class InputError(ValueError):
    """Something the user gave cannot be used: the message names the value, what is allowed and the remedy.

    Raised before any training time is spent. Scripts print it as one line and exit with status 2; in a
    notebook or a Trainer subclass it is an ordinary `ValueError`.
    """
