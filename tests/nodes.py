"""Ray nodes in processes of their own, for tests that must not depend on the cluster of the test process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
NODE = [f"--object-store-memory={100 << 20}", "--dashboard-agent-listen-port=0", "--disable-usage-stats", "--block"]
STARTED = "Ray runtime started"
ATTEMPTS = 3
"""To start a node: on a busy machine Ray gives up now and then."""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_node(env: Mapping[str, str], folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A node in a process group of its own; `folder` is short enough for the paths of sockets.

    Raises:
        RuntimeError: it does not start.
    """
    for _ in range(ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "start.log"
        command = [RAY, "start", *arguments, *NODE, f"--temp-dir={folder}"]
        with log.open("wb") as output:
            node = subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=folder, start_new_session=True)
        while node.poll() is None:
            if STARTED in log.read_text():
                return node
            time.sleep(0.2)
        text = log.read_text()
        end_node(node)
        shutil.rmtree(folder, ignore_errors=True)
    raise RuntimeError(text)


def end_node(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL the node's processes, by their ids; its workers are children of its raylet."""
    if node.poll() is not None:
        return
    processes = descendants(node.pid)
    for process in [node, *processes]:
        kill(process.pid)
    node.wait()
    psutil.wait_procs(processes, timeout=30)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(pid: int) -> None:
    """SIGKILL a process, if it is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
