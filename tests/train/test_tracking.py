"""Curves in TensorBoard's files, in an MLflow store and in those of Weights & Biases, from an arm that is really trained."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from pipeline.config import TrackConfig, build_config
from pipeline.core.errors import InputError
from pipeline.core.storage import Folder
from pipeline.run import run_all
from pipeline.train import tracking, tune
from pipeline.train.arm import Job


@pytest.fixture(autouse=True)
def mlflow_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No usage statistics, no second try at a server that is not there, and a store of files, which stands for the server."""
    settings = {"DISABLE_TELEMETRY": "true", "HTTP_REQUEST_MAX_RETRIES": "0", "ALLOW_FILE_STORE": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)


def scalars(events: bytes) -> dict[str, list[tuple[int, float]]]:
    """The curves in an event file, a series of records: eight bytes of length, four of checksum, the event, four of checksum."""
    found: dict[str, list[tuple[int, float]]] = {}
    while events:
        end = 12 + struct.unpack("<Q", events[:8])[0]
        event = Event.FromString(events[12:end])
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
        events = events[end + 4 :]
    return found


BLOCK = 32768


def logged(file: bytes) -> list[dict[str, Any]]:
    """What an offline run of Weights & Biases has for the server. Seven bytes tell the format; then blocks of pieces, each with
    four bytes of checksum, two of length and one that says whether a record ends with it."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, record, place = list[dict[str, Any]](), b"", 7
    while place < len(file):
        if BLOCK - place % BLOCK < 7:  # no room for another head
            place += BLOCK - place % BLOCK
        length, kind = struct.unpack("<HB", file[place + 4 : place + 7])
        record += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            items = Record.FromString(record).history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            record = b""
    return [one for one in found if one]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_an_arm_is_tracked_in_all_three(
    job: Callable[..., Job], tmp_path: Path, worker_logs: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses at the same steps as in the arm's own curve; the start is drawn at step 1."""
    told: list[tuple[str, str, int, float]] = []
    monkeypatch.setattr(tune, "tell_training", lambda *figures: told.append(figures))
    for name, value in {"MODE": "offline", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    arm, store = job(steps=4, evaluations=2), str(tmp_path / "store")
    storage = Folder.at(tmp_path / "train")
    asked = TrackConfig(tensorboard=True, mlflow=store, wandb="a-project")
    (outcome,) = tune.train_arms([arm], storage, lambda text: None, "run", asked)
    curve = [(max(1, row["step"]), row["eval_nll"]) for row in outcome["curve"]]
    assert [step for step, _ in curve] == [1, 2, 4]

    (events,) = (tmp_path / "train/tune" / arm.name).glob("events.out.tfevents.*")
    drawn = scalars(events.read_bytes())["ray/tune/eval_nll"]
    assert drawn[: len(curve)] == [(step, pytest.approx(nll, abs=1e-5)) for step, nll in curve]

    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(storage.path)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (arm.name, "FINISHED")
    assert {name: run.data.params[f"arm/{name}"] for name in ("init", "lr", "seed")} == {
        "init": "base",
        "lr": "0.01",
        "seed": "0",
    }
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "eval_nll")] == curve

    (offline,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [row for row in logged(offline.read_bytes()) if "eval_nll" in row]
    assert [(row["step"], row["eval_nll"]) for row in rows] == [(row["step"], row["eval_nll"]) for row in outcome["curve"]]

    assert [figures[:3] for figures in told] == [("run", arm.name, row["tokens"]) for row in outcome["curve"]]
    assert f"INFO stage=train adapter={arm.arm.name} node=" in worker_logs()


def test_nothing_is_written_unasked() -> None:
    assert tracking.callbacks(TrackConfig(), "experiment") == []


@pytest.mark.parametrize(
    ("asked", "package"),
    [({"tensorboard": True}, "tensorboardX"), ({"mlflow": "http://x"}, "mlflow"), ({"wandb": "x"}, "wandb")],
)
def test_a_missing_package_is_said_before_anything_is_spent(
    asked: dict[str, Any], package: str, tiny_base: str, write_jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    target = {"train": write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])}
    content = {"run": str(tmp_path / "run"), "base": tiny_base, "pool": str(tmp_path / "pool"), "target": target, "track": asked}
    with pytest.raises(InputError, match=rf"install {package} to use track.{next(iter(asked))}: pip install '\.\[track\]'"):
        run_all(build_config(content, "test"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "nosuch://store"])
def test_a_server_that_cannot_be_used_is_an_input_error(uri: str) -> None:
    with pytest.raises(InputError, match=f"track.mlflow: {uri}: cannot be used"):
        tracking.check(TrackConfig(mlflow=uri))


@pytest.fixture
def without_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and a server that would be asked is not there."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")


@pytest.mark.usefixtures("without_wandb")
@pytest.mark.parametrize(
    ("project", "environment", "message"),
    [
        ("a", {}, "there is no key: set WANDB_API_KEY, or WANDB_MODE=offline"),
        ("a", {"WANDB_API_KEY": "short"}, "a: cannot be used"),
        ("a/b", {"WANDB_MODE": "offline"}, "a/b: cannot be used"),
    ],
)
def test_what_weights_and_biases_would_refuse_is_an_input_error(
    project: str, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"track.wandb: {message}"):
        tracking.check(TrackConfig(wandb=project))


@pytest.mark.usefixtures("without_wandb")
def test_offline_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.check(TrackConfig(wandb="a-project"))
