"""The one exception for what a person can mend: its message is a sentence that says what was found, wanted, and to change."""


class Refusal(ValueError):
    """Raised before any harm is done; the command line prints its message without a traceback."""
