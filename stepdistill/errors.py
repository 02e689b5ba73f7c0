"""The exception for errors that a user can mend."""


class UserError(ValueError):
    """A mistake in the input, the configuration or the environment, reported before any harm is done.

    The message is one sentence: what was found, what was wanted, and what to change. The command line prints it without a
    traceback and exits with code 2.
    """


Refusal = UserError
"""The name of this exception in version 0.1, kept for code that catches it."""
