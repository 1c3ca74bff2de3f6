"""What can go wrong by no fault of the program."""


class ExperimentError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do."""
