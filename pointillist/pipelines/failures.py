"""From an exception to a sentence that says what happened and what to try next."""

from __future__ import annotations

import errno
from collections.abc import Iterator

OUT_OF_MEMORY = (" out of memory", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_ALLOC_FAILED")


def explain(error: BaseException) -> str:
    """One sentence. Errors of ours are already such sentences; others are told apart by what is known of them."""
    if is_out_of_memory(error):
        return f"there is not enough memory; try a smaller size or fewer frames ({first_line(error)})"
    if is_disk_full(error):
        return f"{first_line(error)}; the disk is full: delete some outputs, or free space, and try again"
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    return f"this should not have happened; POINTILLIST_DEBUG=1 shows where: {first_line(error)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine or of its GPU."""
    return any(
        isinstance(each, MemoryError)
        or type(each).__name__ == "OutOfMemoryError"
        or (isinstance(each, RuntimeError) and any(words in str(each) for words in OUT_OF_MEMORY))
        for each in _chain(error)
    )


def is_disk_full(error: BaseException) -> bool:
    """Or the user's share of it."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(each, OSError) and each.errno in full for each in _chain(error))


def first_line(error: BaseException) -> str:
    """The first line of what it says; with its name, if it is none of ours."""
    said = str(error).partition("\n")[0]
    ours = isinstance(error, (ValueError, OSError)) and said
    return said if ours else f"{type(error).__name__}: {said}" if said else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
