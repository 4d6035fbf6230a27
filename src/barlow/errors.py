"""The exceptions that carry a message for a person."""


class UserError(ValueError):
    """A mistake in what was asked for; the message names what was given and what to do.

    The command line prints the message as one line and exits with status 2.
    """


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where it stands and what to try.

    The command line prints the message as one line and exits with status 1.
    """
