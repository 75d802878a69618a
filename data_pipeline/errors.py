"""The one exception that a user of the pipeline sees."""


class DataError(RuntimeError):
    """Something about the data stops the run; the message is one sentence that names it and the remedy."""


def went_bad(path: str, reason: str) -> str:
    """What is said of a file that could be decoded when it was indexed."""
    return f"{path} can no longer be decoded ({reason}): restore or remove the file and continue with --resume."
