"""Jobs on a cluster of three nodes that asks for a token: sent by `mashup submit` and by Ray's own command, refused, stopped,
taken up again, and what is left when the head is lost. All is in an object store, the base model, too, and nothing of it on what
the nodes share; each has room for one of two training workers.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import RAY, end_node, free_ports, start_node
from ray.job_submission import JobSubmissionClient

from pipeline.core.storage import Folder

TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
HEAD_SECONDS = 12
"""Without the head after which Ray ends a driver."""
STOPS = int(os.environ.get("MASHUP_STOPS", "1"))
"""Jobs that are stopped once their pool is indexed, one after the other, each of a run of its own."""

pytestmark = [pytest.mark.long, pytest.mark.timeout(1000 + 200 * STOPS), pytest.mark.xdist_group("cluster")]


@dataclass
class World:
    """A cluster and what a user of it has: the environment and the config."""

    head: subprocess.Popen[bytes]
    gcs: str
    env: dict[str, str]
    config: dict[str, Any]
    folder: Path

    def write(self, **changes: Any) -> str:
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(self.config | changes))
        return str(file)

    def mashup(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env or self.env)

    def client(self) -> JobSubmissionClient:
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        return JobSubmissionClient(self.env["RAY_API_SERVER_ADDRESS"], headers={"Authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def world(
    object_store: str,
    tiny_base: str,
    make_adapter: Callable[..., Path],
    train_donor: Callable[..., None],
    word_rows: list[dict[str, Any]],
    write_jsonl: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    train_donor(folder / "pool/related", 2)
    make_adapter(folder / "pool/random", tiny_base, rank=2, alpha=4, std=0.1)
    write_jsonl(folder / "train.jsonl", word_rows)
    Folder.at("s3://cluster?allow_bucket_creation=true").create()
    bucket = Folder.at("s3://cluster")
    bucket.upload(folder / "pool", "pool")
    bucket.upload(Path(tiny_base), "base")
    bucket.write_bytes("train.jsonl", (folder / "train.jsonl").read_bytes())
    config = {
        "run": "s3://cluster/whole",
        "base": "s3://cluster/base",
        "pool": "s3://cluster/pool",
        "target": {"train": "s3://cluster/train.jsonl"},
        "search": {"samples": 24, "engine": "transformers", "cpus_per_actor": 1},
        "train": {"steps": 4, "batch_size": 8, "learning_rates": [5e-3], "evaluations": 2, "workers": 2, "cpus_per_worker": 1.5},
        "compare": {"inits": ["mashup"]},
    }
    (folder / "token").write_text("0123456789abcdef" * 2)
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_SECONDS)}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    gcs, dashboard, client = free_ports(3)
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    nodes: list[subprocess.Popen[bytes]] = []
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a path that is short enough for sockets
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    try:
        nodes.append(start_node(env, temporary / "0", "--head", "--num-cpus=2", *ports))
        for number in ("1", "2"):
            nodes.append(start_node(env, temporary / number, "--num-cpus=2", f"--address=127.0.0.1:{gcs}"))
        env["PYTHONPATH"] = str(Path(__file__).parents[2])  # of the user's own commands; the cluster gets the code from them
        yield World(nodes[0], f"127.0.0.1:{gcs}", env, config, folder)
    finally:
        for node in nodes:
            end_node(node)
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Ended:
    """What `mashup submit` said, and the run's folder."""

    code: int
    output: str
    error: str
    run: Folder


@pytest.fixture(scope="module")
def stopped(world: World) -> Ended:
    """A run that is stopped once its pool is indexed. Those before it were taken up again until they said what was done."""
    for number in range(STOPS):
        world.config["run"] = f"s3://cluster/whole-{number}"
        ended = _stopped_once_indexed(world)
        if number < STOPS - 1:
            _taken_up(world)
    return ended


def _stopped_once_indexed(world: World) -> Ended:
    command, run = world.mashup("submit", world.write()), Folder.at(world.config["run"])
    job = _job_of(command)
    while not _indexed(run) and command.poll() is None:
        time.sleep(0.2)
    assert world.client().stop_job(job)
    output, error = command.communicate(timeout=300)
    return Ended(command.returncode, output, error, run)


def _taken_up(world: World) -> None:
    command = world.mashup("submit", world.write())
    job = _job_of(command)
    assert command.stderr is not None
    told = next((line for line in command.stderr if "index  " in line), "nothing")
    assert "index    already done" in told, f"{world.config['run']}: {told}"
    world.client().stop_job(job)
    command.communicate(timeout=300)


def _job_of(command: subprocess.Popen[str]) -> str:
    assert command.stderr is not None
    return next(word for word in command.stderr.readline().split() if word.startswith("mashup-"))


@pytest.fixture(scope="module")
def whole(world: World, stopped: Ended) -> Ended:
    """The same run, taken up again and brought to its end."""
    command = world.mashup("submit", world.write())
    job = _job_of(command)
    again = world.mashup("submit", world.write())
    output, error = command.communicate(timeout=1100)
    _check_followed(again, job, output)
    return Ended(command.returncode, output, error, stopped.run)


def _check_followed(again: subprocess.Popen[str], job: str, output: str) -> None:
    """Who submitted the job a second time while it was there saw the first one to its end."""
    found, error = again.communicate(timeout=300)
    assert again.returncode == 0, error
    assert error.startswith(f"job {job} was submitted before and has not ended")
    assert found == output


def _indexed(run: Folder) -> bool:
    return run.exists("stages.json") and run.read_json("stages.json").get("index", {}).get("done", False)


def last_line(log: str) -> dict[str, Any]:
    found: dict[str, Any] = next(json.loads(line) for line in reversed(log.splitlines()) if line.startswith('{"status"'))
    return found


def test_nobody_gets_in_without_the_token(world: World) -> None:
    stranger = {name: value for name, value in world.env.items() if name not in TOKEN} | {"RAY_AUTH_MODE": "disabled"}
    command = world.mashup("submit", world.write(), env=stranger)
    _, error = command.communicate(timeout=300)
    assert command.returncode == 2, error
    assert "RAY_AUTH_TOKEN_PATH" in error.strip().splitlines()[-1]


def test_what_the_cluster_lacks_is_said_at_once(world: World) -> None:
    command = world.mashup("submit", world.write(run="s3://cluster/none", train=world.config["train"] | {"gpus_per_worker": 1}))
    _, error = command.communicate(timeout=300)
    assert command.returncode == 2, error
    line = error.strip().splitlines()[-1]
    assert "train.gpus_per_worker: a worker asks for 1 GPU, and the largest node of the cluster has 0" in line
    assert not Folder.at("s3://cluster/none").exists("catalogue.parquet")


def test_a_job_that_is_stopped_says_so_and_ends(stopped: Ended) -> None:
    assert stopped.code == 1, stopped.error
    assert "the same job goes on from here" in stopped.error.strip().splitlines()[-1]


def test_the_next_one_goes_on_through_the_whole_run(whole: Ended) -> None:
    assert whole.code == 0, whole.error
    assert "index    already done" in whole.error
    assert "Donors: related" in whole.output
    assert "Validation NLL" in whole.output  # the table of `mashup run`
    run = whole.run
    summary = run.read_json("summary.json")
    assert last_line(whole.error) == {
        "status": "done",
        "exit_code": 0,
        "run": run.uri,
        **{name: summary[name] for name in ("verdict", "why", "donors", "recipe", "parity", "adapter")},
        "report": f"{run.uri}/report.html",
    }
    assert run.exists("report.html")
    assert run.exists("finetuned/adapter_model.safetensors")


def test_rays_own_command_finds_what_is_done(world: World, whole: Ended) -> None:
    modules = {"py_modules": [str(Path(__file__).parents[2] / name) for name in ("pipeline", "jobs")]}
    work = world.folder / "work"
    work.mkdir()
    shutil.copy(world.write(), work / "config.yaml")
    submit = [RAY, "job", "submit", "--working-dir", str(work), "--runtime-env-json", json.dumps(modules), "--"]
    job = [*submit, "python", "-m", "jobs.search", "config.yaml"]
    done = subprocess.run(job, capture_output=True, text=True, env=world.env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("already done") == 3
    ending = last_line(done.stdout)
    assert [ending["exit_code"], ending["run"]] == [0, whole.run.uri]
    assert [place["adapter_id"] for place in ending["leaderboard"]] == ["related", "base", "random"]


def test_a_run_whose_cluster_loses_its_head_ends_with_a_line(world: World) -> None:
    """The last one: it takes the head away. The driver is not on the cluster, as with `mashup run` and RAY_ADDRESS."""
    script = "import time; from pipeline.cluster.connect import connect; connect(); print('joined', flush=True); time.sleep(600)"
    env = world.env | {"RAY_ADDRESS": world.gcs, "RAY_BACKEND_LOG_LEVEL": "fatal"}
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "joined\n"
    end_node(world.head)
    _, error = driver.communicate(timeout=300)
    assert driver.returncode == 1
    line = error.strip().splitlines()[-1]
    assert "no Ray cluster answers at" in line
    assert "the same command goes on from here" in line
