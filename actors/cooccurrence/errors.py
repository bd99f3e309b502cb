"""What the co-occurrence service refuses."""


class CooccurrenceError(Exception):
    """A table that cannot be made, read or used; the text says why and what to do."""
