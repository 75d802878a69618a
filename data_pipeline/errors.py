"""The one exception that a user of the pipeline sees, and the one that loaders raise among themselves."""


class DataError(RuntimeError):
    """Something about the data stops the run; the message is one sentence that names it and the remedy."""


class BadFiles(Exception):
    """Raised by a loader's `_produce`: images that could be decoded when they were indexed, and can't now.

    `Loader.batches` quarantines them and goes on; it reaches nobody else.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons
        """Position in the split -> why, in a few words."""
