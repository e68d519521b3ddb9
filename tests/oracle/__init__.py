"""The third witness: an independent recorder that shares no code with nmconv."""

from oracle.recorder import Entry, assert_same, dropped, is_activation, record

__all__ = ["Entry", "assert_same", "dropped", "is_activation", "record"]
