"""The one error that bad input gets."""


class InputError(ValueError):
    """Something the caller gave cannot work. The message is one line: what was given, what is accepted, what to do."""
