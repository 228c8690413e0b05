"""How a job ends, in a process of its own: an exit code, and one JSON object as the last line."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RAYS_OWN = "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))"
WAITING = "print('waiting', flush=True); time.sleep(300)"


def start(work: str) -> subprocess.Popen[str]:
    """A job whose work is the body of a function."""
    script = f"""
import signal, sys, time
from jobs.entry import run_job
from pipeline.core.errors import InputError
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell has started in the background
def work():
    {work}
run_job(work)
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(job: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    output, error = job.communicate(timeout=120)
    assert "Traceback" not in error
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return job.returncode, found


@pytest.mark.parametrize(
    ("work", "ending"),
    [
        ("return {'verdict': 'base'}", {"status": "done", "exit_code": 0, "verdict": "base"}),
        ("return {'status': 'nothing to do', 'exit_code': 3}", {"status": "nothing to do", "exit_code": 3}),
        ("raise InputError('no such pool')", {"status": "wrong input", "exit_code": 2, "error": "no such pool"}),
        ("raise OSError('a long story\\ndisk full')", {"status": "failed", "exit_code": 1, "error": "OSError: disk full"}),
    ],
)
def test_the_last_line_says_how_it_ended(work: str, ending: dict[str, Any]) -> None:
    assert end(start(work.replace("\n", "\\n"))) == (ending["exit_code"], ending)


@pytest.mark.parametrize("before", ["pass", RAYS_OWN], ids=["before Ray is up", "with Ray's handler"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_told_to_stop(before: str, number: signal.Signals) -> None:
    job = start(f"{before}; {WAITING}")
    assert job.stdout is not None
    assert job.stdout.readline() == "waiting\n"
    job.send_signal(number)
    code, ending = end(job)
    assert (code, ending["status"], ending["exit_code"]) == (1, "stopped", 1)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.mashup", str(tmp_path / "none.yaml"), "--run", str(tmp_path / "run")]
    code, ending = end(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert (code, ending["status"]) == (2, "wrong input")
    assert "none.yaml: cannot read the config file" in ending["error"]
    assert not (tmp_path / "run").exists()
