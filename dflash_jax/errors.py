"""The one error that bad input gets."""


class InputError(ValueError):
    """Something the caller gave cannot work. The message is one line: what was given, what is accepted, what to do."""


class TooLongError(InputError):
    """A prompt that is longer than the model, or what serves it, takes."""

    def __init__(self, tokens: str, most: int):
        super().__init__(
            f"the prompt has {tokens} tokens; the maximum context length is {most + 1}, give at most {most}"
        )
