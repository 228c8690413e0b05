"""Who a process is, so that another one can tell whether it has ended: where Linux says so, on the same machine."""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

Process = dict[str, Any]
"""`host` and `process`, its number there, for people; `machine` and `started` tell it from all others."""


def this_process() -> Process:
    return {"host": socket.gethostname(), "process": os.getpid(), "machine": _machine(), "started": _started(os.getpid())}


def may_be_seen(process: Process) -> bool:
    """Whether it can be seen from here if a process has ended."""
    return process.get("machine") is not None and process["machine"] == _machine()


def is_gone(process: Process) -> bool:
    """Whether a process has ended, as far as can be seen from here."""
    if not may_be_seen(process):
        return False
    try:
        os.kill(process["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, of whom the rest may be hidden
        return False
    return _started(process["process"]) != process["started"]


def _machine() -> str | None:
    """This machine since it was booted, and the container on it in which numbers of processes hold. None: there is no telling.
    Machines that were copied while they ran differ by their host's name alone."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _started(number: int) -> str | None:
    """When a process was started, in ticks since the machine was booted; its number may be given to another one later. None: it
    has ended."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None
