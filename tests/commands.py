"""`mashup run` as a user runs it, in a process of its own: with a Ray of its own, or on a cluster that outlives it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from nodes import descendants, end_node, free_ports, kill, start_node

from pipeline.core.storage import Folder

FAULTY = Path(__file__).parent / "faulty"
FLAG = "MASHUP_FAULT"
"""Names the file that says how the storage of a process, and of the Ray that it starts, misbehaves: see tests/faulty."""
JOINED = {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "12"}
"""Of a cluster and of those that join it: nobody needs a token, and a driver ends soon after the head."""

Tables = dict[str, Any]


def disturbed_environment(flag: Path) -> dict[str, str]:
    path = os.pathsep.join([str(FAULTY), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return environment | {FLAG: str(flag), "PYTHONPATH": path}


class Cluster:
    """One node of Ray that commands join. It is started once it is needed, and again after its end."""

    def __init__(self, flag: Path):
        self.flag = flag
        self._node: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._folder = Path(tempfile.mkdtemp(dir="/tmp"))  # a path that is short enough for sockets

    def address(self) -> str:
        if not any(process.name() == "raylet" for process in self.processes()):
            self.end()
            (self._port,) = free_ports(1)
            arguments = ["--head", f"--port={self._port}", "--include-dashboard=false"]
            self._node = start_node(disturbed_environment(self.flag) | JOINED, self._folder, *arguments)
        return f"127.0.0.1:{self._port}"

    def processes(self) -> list[psutil.Process]:
        return descendants(self._node.pid) if self._node and self._node.poll() is None else []

    def end(self) -> None:
        if self._node:
            end_node(self._node)
        shutil.rmtree(self._folder, ignore_errors=True)


class Command:
    """`mashup run` of one run folder, `run`; in the local `folder` are its config and its log."""

    def __init__(self, config: dict[str, Any], folder: Path, run: str, flag: Path, cluster: Cluster | None):
        self.run, self.log, self.flag, self.cluster = Folder.at(run), folder / "log", flag, cluster
        self._file = folder / "config.yaml"
        folder.mkdir(exist_ok=True)
        self._file.write_text(yaml.safe_dump({**config, "run": run}))
        self.process: psutil.Popen | None = None
        self._family = set[psutil.Process]()

    def start(self) -> None:
        environment = disturbed_environment(self.flag)
        if self.cluster:
            environment |= JOINED | {"RAY_ADDRESS": self.cluster.address()}
        command = [sys.executable, "-m", "pipeline.cli", "run", str(self._file)]
        with self.log.open("a") as log:
            self.process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True, env=environment)

    def processes(self) -> list[psutil.Process]:
        """The driver first, then what works for it: its descendants, and those of its cluster."""
        if self.process is None or self.process.poll() is not None:
            return []
        family = descendants(self.process.pid)
        self._family |= set(family)
        return [psutil.Process(self.process.pid), *family, *(self.cluster.processes() if self.cluster else [])]

    def ended(self, seconds: float = 0) -> int | None:
        """The exit code once the command and its own Ray are gone; None where it still runs after so many seconds."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while (code := self.process.poll()) is None:
            self.processes()
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)
        _, alive = psutil.wait_procs([one for one in self._family if one.is_running()], timeout=60)
        for one in alive:
            kill(one.pid)
        self.process = None
        return int(code)

    def tables(self) -> Tables:
        """What a run comes to, without times and places."""
        curves = [row | {"seconds": None} for row in self.run.read_table("comparison.parquet").to_pylist()]
        names = ("catalogue.parquet", "leaderboard.parquet", "samples.parquet")
        tables = {name: self.run.read_table(name).to_pylist() for name in names}
        return tables | {"comparison.parquet": json.dumps(curves), "selection.json": self.run.read_json("selection.json")}
