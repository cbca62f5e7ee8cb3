"""What ends a training that neither a setting nor an argument is to blame for."""


class TrainingError(RuntimeError):
    """A reward that fails, a disk that is full: said in a line, without a traceback."""
