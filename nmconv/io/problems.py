"""What can be wrong with a file. :func:`nmconv.load` turns each of these into a FileError."""

__all__ = ["DamagedFile", "ForeignFile", "UnsupportedFormat"]


class DamagedFile(ValueError):
    """The file has contents that :func:`nmconv.save` never writes."""


class ForeignFile(ValueError):
    """The file does not fit the model."""


class UnsupportedFormat(ValueError):
    """The file has another format version."""
