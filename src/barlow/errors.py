"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what was asked for; the message names what was given and what to do.

    The command line prints the message as one line and exits with status 2.
    """
