"""How a command ends: its exit status, and its error as one line on stderr."""

import errno
import sys
from collections.abc import Callable

from barlow.errors import TrainingError, UserError, is_out_of_memory, one_line

DONE, FAILED, USER_MISTAKE = 0, 1, 2


def run_and_report(run: Callable[[], None], in_batches: bool) -> int:
    """Run a command; print the error that ends it, if the user can act on it.

    Args:
        run: the command.
        in_batches: whether it has an option --batch-size, which is named if memory runs out.

    Returns:
        Exit status: 0 for success, 2 for a user's mistake, 1 for anything else. Unexpected errors
        are raised.
    """
    try:
        run()
    except UserError as error:
        return _fail(error, USER_MISTAKE)
    except TrainingError as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", FAILED)
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "the disk"
        message = (
            f"cannot use {place} ({error.strerror}): free up space, fix its permissions, or "
            "use another location"
        )
        return _fail(message, USER_MISTAKE)
    except Exception as error:
        if not (in_batches and is_out_of_memory(error)):
            raise
        message = "out of memory: use a smaller --batch-size, or --limit the number of images"
        return _fail(message, FAILED)
    return DONE


def _fail(message: object, status: int) -> int:
    print(f"barlow: {one_line(message)}", file=sys.stderr)
    return status
