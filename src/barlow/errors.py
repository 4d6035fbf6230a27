"""The exceptions that carry a message for a person."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what was asked for; the message names what was given and what to do.

    The command line prints the message as one line and exits with status 2.
    """


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where it stands and what to try.

    The command line prints the message as one line and exits with status 1.
    """


def one_line(error: object, at_most: int | None = None) -> str:
    """What an exception says, on one line; its name if it says nothing.

    Example:
        >>> one_line(ValueError("no such  name, nor another"), at_most=12), one_line(EOFError())
        ('no such name', 'EOFError')
    """
    return " ".join(str(error).split())[:at_most] or type(error).__name__


@contextmanager
def user_error_if_unreadable(
    place: object, problem: str = "is damaged or was written by another version of barlow"
) -> Iterator[None]:
    """Turn any error while using a file's content into a UserError that names the file."""
    try:
        yield
    except Exception as error:  # a damaged file can end in any
        raise UserError(f"{place} {problem}: {one_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had less memory than was asked of it, here or in a process started here."""
    # CUDA, MPS and XPU say the one, torch's allocator of the CPU the other.
    message = str(error)
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in message for sign in signs)
