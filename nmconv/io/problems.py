"""What can be wrong with a file. None of these leaves this package: :func:`nmconv.load` makes a FileError of each."""

__all__ = ["DamagedFile", "ForeignFile", "UnreadFormat"]


class DamagedFile(ValueError):
    """The file says what no file of :func:`nmconv.save` says."""


class ForeignFile(ValueError):
    """The file does not fit the model."""


class UnreadFormat(ValueError):
    """The file is of another format version."""
