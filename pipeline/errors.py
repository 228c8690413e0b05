"""The errors that a user is meant to read: one line, the thing at fault, the way out."""


class InputError(ValueError):
    """What the user gave cannot be worked with. The command line prints it and exits with code 2."""


class AdapterError(ValueError):
    """One adapter cannot be a donor. The message is the reason that the catalogue shows; it stops nothing."""
