"""The one exception that users meet."""


class InputError(ValueError):
    """What a user gave cannot be used; the message is one plain sentence.

    It names the key or the file, what was wrong and what is accepted. The command line prints it and
    exits with code 2; any other exception is a bug.
    """


def accept(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise an InputError that names the key, the value and what is accepted, unless value is a choice."""
    if value not in choices:
        raise InputError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")
