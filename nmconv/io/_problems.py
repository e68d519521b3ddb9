"""What can be wrong with a file. None of these leaves this package: :func:`nmconv.load` makes a FileError of each."""

__all__ = ["Damaged", "Foreign", "Unread"]


class Damaged(ValueError):
    """The file says what no file of :func:`nmconv.save` says."""


class Foreign(ValueError):
    """The file does not fit the model."""


class Unread(ValueError):
    """The file is of another format version."""
