"""The errors that a user is meant to read: one line, the thing at fault, the way out."""

import errno

from pipeline.core.hub import HubBusyError


class InputError(ValueError):
    """What the user gave cannot be worked with. The command line prints it and exits with code 2."""


MAX_REASON = 400
"""Characters."""


def for_display(text: str, limit: int) -> str:
    """What a stranger wrote, for terminals, pages and logs: control characters are escaped, and it is cut at `limit`."""
    safe = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[:limit]}..."


class AdapterError(ValueError):
    """One adapter cannot be a donor. The message is the reason that the catalogue shows; it stops nothing.

    What a stranger wrote may be a part of it, so that it is made fit `for_display`, at most MAX_REASON of it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(for_display(reason, MAX_REASON))


class PassTooLargeError(RuntimeError):
    """A training pass ran out of memory in one of several workers that hold a part of the model each: the others wait for it, and
    all must start anew."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes)
        self.sizes = sizes
        """Padded tokens a pass: those that were tried, and last the one to try next."""

    def __str__(self) -> str:
        return f"a worker ran out of memory; training goes on with {self.sizes[-1]} padded tokens a pass"


EXPIRED = ("ExpiredToken", "EXPIRED_TOKEN", "InvalidToken", "RequestExpired")
REFUSED = (*EXPIRED, "ACCESS_DENIED", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
UNREACHABLE = ("NETWORK_CONNECTION", "REQUEST_TIMEOUT", "curlCode", "HTTP error")
OVERLOADED = ("SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "THROTTLING", "HTTP status 5", "HTTP status 429")
"""Marks of an object store's errors in what pyarrow and `uploads` raise."""
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ETIMEDOUT)


def is_transient(error: BaseException) -> bool:
    """Whether an error is of the disk, the network, the object store or credentials that have expired, and not of what was asked:
    the same may work later."""
    if isinstance(error, HubBusyError):
        return True
    marks = (*UNREACHABLE, *OVERLOADED, *EXPIRED)
    return isinstance(error, OSError) and (error.errno in PASSING or any(mark in str(error) for mark in marks))


def as_adapter_error(error: Exception, reason: str) -> Exception:
    """What to raise of an adapter that cannot be read for an error: that it cannot be a donor, with the reason; but an error that
    may pass is none of the adapter's, and is raised as it is."""
    return error if is_transient(error) else AdapterError(reason)


CAUSED = "The above exception was the direct cause of the following exception"
"""Stands in what Ray raises for a failed worker, after that one's error; what follows is not about it."""
ADVICE = ("To change retry attempts", "Failed to apply UDF")
"""Lines that Ray adds to a worker's error."""


def first_line(error: BaseException) -> str:
    """The first line of what a library says, which may go on with advice; where it says nothing, the kind of the error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unknown_base(base: str, error: BaseException) -> InputError:
    """Of a base model that a library cannot find or read, by the library's `error`."""
    return InputError(f"{base}: unknown base model; give a local folder, a Hub id within reach or s3://... ({first_line(error)})")


def one_line(error: BaseException) -> str:
    """What went wrong, in one line for a person: the error's last one, and what to do where an object store is at fault."""
    worker, _, rest = str(error).rpartition(CAUSED)
    lines = [line for line in (worker or rest).strip().splitlines() if not line.startswith(ADVICE)] or [""]
    hint = ""
    if isinstance(error, OSError) and any(mark in str(error) for mark in REFUSED):
        hint = "the object store refuses these credentials, or they have expired: renew them in the environment; "
    elif isinstance(error, OSError) and any(mark in str(error) for mark in UNREACHABLE):
        hint = "the object store does not answer: look at the network and at AWS_ENDPOINT_URL; "
    return f"{hint}{type(error).__name__}: {lines[-1]}"
