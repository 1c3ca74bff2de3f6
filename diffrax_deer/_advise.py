"""Stub."""


class Advice:
    """Stub."""


def advise():
    """Stub."""
