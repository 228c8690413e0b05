"""`mashup submit` without a cluster: what goes with a job, how its end is read, and what is said where a server fails."""

import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus

from pipeline import submit
from pipeline.core.errors import InputError

CONFIG = {
    "run": "s3://bucket/run",
    "base": "org/model",
    "pool": "/shared/pool",
    "target": {"train": "s3://bucket/train.jsonl"},
}
DONE = '{"status": "done", "exit_code": 0, "run": "/nowhere/run", "verdict": "base", "donors": []}'


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(CONFIG | changes))
        return str(file)

    return write


class Client:
    """A job server that runs nothing: `log` is what the job would write."""

    def __init__(self, log: str, status: JobStatus = JobStatus.SUCCEEDED, failure: BaseException | None = None):
        self.log, self.status, self.failure = log, status, failure
        self.sent: dict[str, Any] = {}
        self.known: dict[str | None, JobStatus] = {}

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=number, status=status) for number, status in self.known.items()]

    def submit_job(self, entrypoint: str, runtime_env: dict[str, Any], submission_id: str) -> str:
        folder = Path(runtime_env["working_dir"])
        files = {file.name: file.read_text() for file in folder.iterdir()}
        self.sent = {"entrypoint": entrypoint, "files": files, "id": submission_id, **runtime_env}
        return "raysubmit_1"

    async def tail_job_logs(self, number: str) -> AsyncIterator[str]:
        yield self.log
        if self.failure:
            raise self.failure

    def get_job_logs(self, number: str) -> str:
        return self.log

    def get_job_info(self, number: str) -> Any:
        return SimpleNamespace(status=self.status, message="first\nlast")

    def get_address(self) -> str:
        return "http://head:8265"


def send(monkeypatch: pytest.MonkeyPatch, client: Client, path: str, job: str = "mashup", **more: Any) -> int:
    monkeypatch.setattr(submit, "connect", lambda address: client)
    return submit.submit_job(path, job, **more)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"run": "runs/medicine"}, "run"),
        ({"base": "./model"}, "base"),
        ({"base": "~/model"}, "base"),
        ({"base": "models/of/mine"}, "base"),
        ({"pool": "adapters/"}, "pool"),
        ({"target": {"train": "train.jsonl"}}, "target.train"),
        ({"target": {"train": "/train.jsonl", "validation": "validation.jsonl"}}, "target.validation"),
        ({"target": {"train": "/train.jsonl", "test": "test.jsonl"}}, "target.test"),
        ({"search": {"store": "scores"}}, "search.store"),
    ],
)
def test_a_relative_path_stays_at_home(write: Any, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"mine.yaml: {key}: .* is a relative path"):
        submit.portable_config(write(**changes), "mashup", None)


def test_a_folder_of_the_base_that_looks_like_a_hub_id(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit.portable_config(write(), "mashup", None)["base"] == "org/model"
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="base: org/model is a relative path"):
        submit.portable_config(write(), "mashup", None)


def test_the_paths_of_a_refresh_are_found_under_names_of_the_users() -> None:
    targets = {"law": {"train": "a", "test": None, "max_tokens": 64}, "base": {"train": "b"}}
    content = {"home": "h", "base": "m", "pool": "p", "targets": targets, "search": {"samples": 8, "store": "s"}}
    found = {"home": "h", "base": "m", "pool": "p", "targets.law.train": "a", "targets.base.train": "b", "search.store": "s"}
    assert dict(submit.paths(content)) == found


def test_the_run_folder_of_the_command_takes_the_place_of_the_configs(write: Any) -> None:
    assert submit.portable_config(write(run="runs/here"), "search", "/shared/run")["run"] == "/shared/run"
    with pytest.raises(InputError, match="run: here is a relative path"):
        submit.portable_config(write(), "mashup", "here")


def test_settings_of_a_refresh_go_with_it(tmp_path: Path) -> None:
    file = tmp_path / "refresh.yaml"
    content = {"home": "/home", "base": "org/model", "pool": "/pool", "targets": {"law": {"train": "/law.jsonl"}}}
    file.write_text(yaml.safe_dump(content))
    settings = ["threshold=0.5", "targets.law.train=s3://bucket/law.jsonl"]
    sent = submit.portable_config(str(file), "refresh", None, settings)
    assert sent == content | {"threshold": 0.5, "targets": {"law": {"train": "s3://bucket/law.jsonl"}}}
    with pytest.raises(InputError, match=r"targets\.law\.train: law\.jsonl is a relative path"):
        submit.portable_config(str(file), "refresh", None, ["targets.law.train=law.jsonl"])


def test_options_of_the_job_are_passed_on(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client('{"status": "done", "exit_code": 3}\n')
    assert send(monkeypatch, client, write(), options=["--plan", "a b"]) == 3
    assert client.sent["entrypoint"] == "python -m jobs.mashup config.yaml --plan 'a b'"


def test_what_goes_with_a_job(write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = Client(f"working\n{DONE}\n")
    assert send(monkeypatch, client, write(), job="search") == 0
    assert client.sent["entrypoint"] == "python -m jobs.search config.yaml"
    assert yaml.safe_load(client.sent["files"].pop("config.yaml")) == CONFIG
    assert client.sent["files"] == {}
    assert [Path(module, "__init__.py").is_file() for module in client.sent["py_modules"]] == [True, True]
    assert [Path(module).name for module in client.sent["py_modules"]] == ["pipeline", "jobs"]
    assert "secret" not in str(client.sent)
    written = capsys.readouterr()
    assert "ray job stop raysubmit_1 --address http://head:8265" in written.err
    assert "working" in written.err
    assert "verdict: base" in written.out  # what the last line says, as the run's folder cannot be read from here


@pytest.mark.parametrize(
    ("log", "status", "code", "line"),
    [
        ('x\n{"status": "wrong input", "exit_code": 2, "error": "no such pool"}\nbye\n', JobStatus.FAILED, 2, "no such pool"),
        ('{"status": "failed", "exit_code": 1, "error": "disk full"}', JobStatus.FAILED, 1, "disk full"),
        ("Terminated\n", JobStatus.STOPPED, 1, "goes on from here"),
        ('{"status": "failed", "exit_\nKilled\n', JobStatus.FAILED, 1, "wrote no result line: first last"),
    ],
)
def test_the_exit_code_is_the_jobs_own(
    write: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    log: str,
    status: JobStatus,
    code: int,
    line: str,
) -> None:
    assert send(monkeypatch, Client(log, status), write()) == code
    written = capsys.readouterr()
    assert line in written.err.strip().splitlines()[-1]
    assert written.out == ""


def test_ctrl_c_leaves_the_job_running(write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert send(monkeypatch, Client("working\n", failure=KeyboardInterrupt()), write()) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the job goes on" in last
    assert "ray job stop raysubmit_1" in last


def test_a_stream_that_breaks_off_is_taken_up_again(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once with an error and once without a word, while the job goes on."""
    log = f"first\nsecond\nthird\n{DONE}\n"
    ends, failures = [8, 10, len(log)], iter([RuntimeError("closed"), None, None])

    class Dropping(Client):
        async def tail_job_logs(self, number: str) -> AsyncIterator[str]:
            yield log[: ends.pop(0)]
            if failure := next(failures):
                raise failure

        def get_job_info(self, number: str) -> Any:
            return SimpleNamespace(status=JobStatus.RUNNING if ends else JobStatus.SUCCEEDED, message=None)

    monkeypatch.setattr(submit, "POLL", 0)
    assert send(monkeypatch, Dropping(log), write()) == 0
    told = capsys.readouterr().err
    assert told.count("first") == told.count("second") == told.count("third") == 1


class Away(Client):
    """A job server that ends while it is listened to."""

    def get_job_info(self, number: str) -> Any:
        raise OSError("connection refused")


def test_a_server_that_goes_away(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PATIENCE", 0)
    monkeypatch.setattr(submit, "POLL", 0.01)
    with pytest.raises(ConnectionError, match=r"lost job raysubmit_1, which may go on .*ray job logs --follow raysubmit_1"):
        send(monkeypatch, Away("working\n", failure=RuntimeError("WebSocket closed")), write())


class Mute(Client):
    """A job server that has no log for anybody; the job works while somebody asks `turns` times."""

    def __init__(self, turns: int, status: JobStatus = JobStatus.SUCCEEDED, streamed: str = "") -> None:
        super().__init__("", status)
        self.turns, self.streamed, self.tried = turns, streamed, 0

    async def tail_job_logs(self, number: str) -> AsyncIterator[str]:
        self.tried += 1
        if self.streamed:
            yield self.streamed
        raise RuntimeError("WebSocket closed")

    def get_job_logs(self, number: str) -> str:
        raise RuntimeError("no agent on the node of the job")

    def get_job_info(self, number: str) -> Any:
        self.turns -= 1
        return SimpleNamespace(status=self.status if self.turns < 0 else JobStatus.RUNNING, message="gone")


@pytest.fixture
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATIENCE", "POLL", "LONGEST_POLL"):
        monkeypatch.setattr(submit, name, 0)


@pytest.mark.usefixtures("in_haste")
def test_a_job_whose_log_cannot_be_followed_is_followed_by_its_status(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Mute(turns=20, streamed=f"first\n{DONE}\n")
    assert send(monkeypatch, client, write()) == 0
    assert client.tried == 21
    told = capsys.readouterr()
    assert told.err.count("first") == 1
    assert told.err.count("the log cannot be followed") == 1
    assert "verdict: base" in told.out


@pytest.mark.usefixtures("in_haste")
@pytest.mark.parametrize(("status", "code"), [(JobStatus.SUCCEEDED, 0), (JobStatus.FAILED, 1), (JobStatus.STOPPED, 1)])
def test_a_job_whose_log_was_never_seen_ends_as_its_status_says(
    write: Any, monkeypatch: pytest.MonkeyPatch, status: JobStatus, code: int
) -> None:
    assert send(monkeypatch, Mute(turns=1, status=status), write()) == code


def test_pauses_grow_where_the_log_cannot_be_followed(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(submit.time, "sleep", pauses.append)
    monkeypatch.setattr(submit, "PATIENCE", 0)
    assert send(monkeypatch, Mute(turns=7), write()) == 0
    assert pauses == [4, 8, 16, 32, 60, 60, 60]


def test_the_id_of_a_job_follows_from_its_run(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def number(job: str = "mashup", options: Sequence[str] = (), **changes: Any) -> str:
        client = Client(DONE)
        send(monkeypatch, client, write(**changes), job, options=options)
        return str(client.sent["id"])

    first = number()
    assert re.fullmatch("mashup-[0-9a-f]{16}-1", first)
    assert number() == number(run="s3://bucket/run/") == number(pool="/shared/other") == first
    assert len({first, number(run="s3://bucket/other"), number("search"), number(options=["--plan"])}) == 4


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING])
def test_who_submits_a_job_that_has_not_ended_follows_it(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: JobStatus
) -> None:
    first, second = Client(DONE), Client('{"status": "failed", "exit_code": 1, "error": "disk full"}\n', JobStatus.FAILED)
    send(monkeypatch, first, write())
    second.known = {"raysubmit_5": JobStatus.RUNNING, first.sent["id"]: status}
    assert send(monkeypatch, second, write()) == 1
    assert not second.sent
    told = capsys.readouterr().err
    assert f"job {first.sent['id']} was submitted before and has not ended: it is followed" in told
    assert f"ray job stop {first.sent['id']} " in told
    assert "disk full" in told


def test_a_job_that_has_ended_is_submitted_again(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(DONE)
    send(monkeypatch, client, write())
    name = client.sent["id"].removesuffix("-1")
    client.known = {f"{name}-{number}": JobStatus.FAILED for number in range(1, 11)}
    client.known |= {None: JobStatus.RUNNING, f"{name}-mine": JobStatus.RUNNING, f"{name}0-50": JobStatus.RUNNING}
    assert send(monkeypatch, client, write()) == 0
    assert client.sent["id"] == f"{name}-11"


def test_of_two_who_submit_at_once_the_second_follows_the_first(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(Client):
        def submit_job(self, entrypoint: str, runtime_env: dict[str, Any], submission_id: str) -> str:
            self.sent = {"id": submission_id}
            raise RuntimeError(f"Request failed with status code 400: ValueError: {reason.format(submission_id)}")

    client, reason = Refusing(DONE), "Job with submission_id {} already exists. Please use a different submission_id."
    assert send(monkeypatch, client, write()) == 0
    assert f"job {client.sent['id']} was submitted before" in capsys.readouterr().err
    reason = "no room for {}"
    with pytest.raises(RuntimeError, match="no room"):
        send(monkeypatch, client, write())


def test_an_unknown_job(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--job train: must be mashup, search or refresh"):
        send(monkeypatch, Client(""), write(), job="train")


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """An HTTP server that gives one answer; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


@pytest.fixture
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("no_address")
@pytest.mark.parametrize("server", [401, 403], indirect=True)
def test_a_cluster_that_asks_for_a_token(server: str) -> None:
    with pytest.raises(InputError, match=f"{server}: .*token.*RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"):
        submit.connect(server)


@pytest.mark.usefixtures("no_address")
@pytest.mark.parametrize("server", [200, 404, 500], indirect=True)
def test_a_server_of_another_kind(server: str) -> None:
    with pytest.raises(ConnectionError, match=f"{server}: no Ray job server answers there"):
        submit.connect(server)


@pytest.mark.usefixtures("no_address")
@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_is_the_commands_or_that_of_rays_own_variables(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:1: no Ray job server"):
        submit.connect(None)
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:2: no Ray job server"):
        submit.connect("http://127.0.0.1:2")


@pytest.mark.usefixtures("no_address")
def test_the_address_of_a_cluster_in_place_of_its_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        submit.connect(None)
