"""The one exception for input that cannot be used."""


class InputError(ValueError):
    """The caller's input is at fault; the message is one line that names the thing and what to do."""
