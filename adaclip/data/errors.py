"""The one error every data reader raises."""


class DataError(ValueError):
    """A data set on disk is missing, damaged or not in its official format.

    The message is one paragraph: which file, what is wrong with it, and what to do.
    """

    def __init__(self, message: str) -> None:
        # A file's name may hold any character, line breaks included.
        super().__init__(" ".join(message.split()))
