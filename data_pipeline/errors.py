"""The one exception that a user of the pipeline sees."""


class DataError(RuntimeError):
    """Something about the data stops the run; the message is one sentence that names it and the remedy."""
