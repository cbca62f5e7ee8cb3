"""What ends a training that no setting or argument is to blame for, and how it is said."""


class TrainingError(RuntimeError):
    """A reward that fails, a disk that is full: said in a line, without a traceback."""


def shorten(value, length=80):
    """What is to be shown of a prompt or completion in a message."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."
