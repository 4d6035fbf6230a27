"""Exceptions whose message is meant for the user."""

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
    """The message of an exception on one line, or its class name if it has no message.

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
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{place} {problem}: {one_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device ran out of memory, in this process or in one that it started."""
    # CUDA, MPS and XPU use the first, torch's CPU allocator the second, cuBLAS and cuDNN the third.
    message = str(error)
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in message for sign in signs)
