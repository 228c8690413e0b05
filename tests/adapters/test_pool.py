"""What a pool lists: folders, list files and object-store prefixes; what is not even looked at, and why."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_server import StoreServer

from pipeline.adapters import pool as pool_module
from pipeline.adapters.pool import look_at, pool_state
from pipeline.core.errors import InputError
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.storage import Folder


def test_paths_that_are_too_long_stop_no_other(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> None:
    make_adapter(tmp_path / "pool" / "good", tiny_base)
    here = os.open(tmp_path / "pool", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("x" * 250, dir_fd=here)
        deeper = os.open("x" * 250, os.O_RDONLY, dir_fd=here)
        os.close(os.open(CONFIG_FILE, os.O_CREAT, dir_fd=deeper))
        os.close(here)
        here = deeper
    os.close(here)
    found = look_at(str(tmp_path / "pool")).listing
    problems = dict(zip(found["adapter_id"], found["problem"], strict=True))
    assert problems.pop("good") is None
    assert any("its name has more than 1000 characters" in str(problem) for problem in problems.values())
    assert all(len(str(name)) < 1100 for name in problems)
    assert Folder.at(tmp_path / "pool").state()
    subprocess.run(["rm", "-r", str(tmp_path / "pool")], check=True)  # pytest's own clean-up fails at such paths


def test_lines_of_a_list_that_name_no_place_are_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(b"a\x00b\n~..\n~nobody/x\n\x1b[31m\r\n")
    found = look_at(str(file)).listing
    problems = dict(zip(found["adapter_id"], found["problem"], strict=True))
    assert problems.keys() == {"a\x00b", "~..", "~nobody/x", "\x1b[31m"}
    assert "control characters" in str(problems["a\x00b"])
    lines = ["local:///etc/x", "hdfs://host/x", "s3://bucket/x?endpoint_override=http://10.0.0.1", "n" * 300, "m" * 5000]
    file.write_text("\ufeff" + "\n".join(["c#x  # a comment", *lines]))  # as editors of Windows write it
    found = look_at(str(file)).listing
    assert found["adapter_id"][:-1] == ["c#x", *lines[:-1]]
    problems = dict(zip(found["adapter_id"], found["problem"], strict=True))
    assert problems["c#x"] is None
    assert all("not a location that a list file may name" in str(problems[line]) for line in lines[:2])
    assert "AWS_ENDPOINT_URL" in str(problems[lines[2]])
    assert "more than 255 bytes" in str(problems[lines[3]])
    assert "more than 1000 characters" in str(found["problem"][-1])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="must be UTF-8 text"):
        look_at(str(file))


def test_an_adapter_folder_is_a_pool_of_one(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> None:
    make_adapter(tmp_path / "only", tiny_base)
    assert look_at(str(tmp_path / "only")).listing == {
        "adapter_id": ["only"],
        "uri": [str(tmp_path / "only")],
        "problem": [None],
    }


def test_adapters_that_the_config_excludes_are_set_aside_unread(tmp_path: Path, tiny_base: str) -> None:
    for name in ("sums", "sums-1001", "summary"):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS_FILE).write_text("")
    problems = look_at(str(tmp_path), ["sums", "sums-[0-9]*"]).listing
    assert problems["problem"] == [
        None,
        "excluded: the config's exclude names 'sums'",
        "excluded: the config's exclude names 'sums-[0-9]*'",
    ]


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_checkpoints_beside_what_they_led_to_are_left_out_unless_asked_for(place: str, tmp_path: Path, bucket: str) -> None:
    pool = Folder.at(str(tmp_path / "pool") if place == "disk" else f"{bucket}/pool")
    steps = ("run/checkpoint-10", "run/checkpoint-20", "run/checkpoint-best", "only/checkpoint-5", "checkpoint-30")
    beside = (
        "trl/checkpoint-1",
        "trl/final_checkpoint",
        "own/out/checkpoint-2",
        "own/out/final",
        "two/checkpoint-3",
        "two/adapter",
    )
    for name in ("run", "final", *steps, *beside):
        pool.write_bytes(f"{name}/{WEIGHTS_FILE}", b"x")
        pool.write_bytes(f"{name}/{CONFIG_FILE}", b"{}")
    asked, all_of_them = (look_at(pool.uri, checkpoints=checkpoints).listing for checkpoints in (False, True))
    assert not any(all_of_them["problem"])
    left_out = {name: problem for name, problem in zip(asked["adapter_id"], asked["problem"], strict=True) if problem}
    led_to = {"run/checkpoint-10": "run", "run/checkpoint-20": "run"}
    led_to |= {"trl/checkpoint-1": "final_checkpoint", "own/out/checkpoint-2": "final"}
    assert left_out == {
        name: f"a checkpoint of {final}, which is in the pool; checkpoints: include takes it" for name, final in led_to.items()
    }


def test_an_adapter_that_is_given_its_old_time_back_is_in_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SETTLED", -(10**12))
    file = tmp_path / "pool/a" / WEIGHTS_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"old")
    [before], written = look_at(str(tmp_path / "pool")).found, file.stat().st_mtime_ns
    assert look_at(str(tmp_path / "pool")).found == [before]
    time.sleep(0.02)
    file.write_bytes(b"new")
    os.utime(file, ns=(written, written))
    [after] = look_at(str(tmp_path / "pool")).found
    assert before.state
    assert after.state not in (before.state, None)


def test_credentials_in_a_list_file_are_refused_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "pool.txt").write_text("org/a\ns3://KEY:SECRET@bucket/adapter\n")
    with pytest.raises(InputError, match="no credentials") as caught:
        look_at(str(tmp_path / "pool.txt"))
    assert "SECRET" not in str(caught.value)


def test_a_list_file_that_names_an_adapter_twice_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "pool.txt").write_text("org/a\norg/b\nhf://org/a\n")
    with pytest.raises(InputError, match="'org/a' is listed twice"):
        look_at(str(tmp_path / "pool.txt"))


def test_a_pool_differs_once_an_adapter_of_its_list_has_changed(bucket: str, tmp_path: Path) -> None:
    """A folder of this machine, one of a store, one of the Hub that nobody has, and one that is not there."""
    for place in (Folder.at(tmp_path / "near"), Folder.at(f"{bucket}/far")):
        place.write_text(CONFIG_FILE, "{}")
        place.write_text(WEIGHTS_FILE, "weights")
    file = tmp_path / "list.txt"
    file.write_text(f"./near\n{bucket}/far\norg/adapter\n./none\n")
    before = pool_state(str(file))
    assert pool_state(str(file)) == before
    Folder.at(tmp_path / "near").write_text("optimizer.pt", "no part of an adapter")
    assert pool_state(str(file)) == before
    Folder.at(tmp_path / "near").write_text(WEIGHTS_FILE, "others")
    after = pool_state(str(file))
    assert after != before
    Folder.at(f"{bucket}/far").write_text(CONFIG_FILE, '{"r": 4}')
    assert pool_state(str(file)) != after
    checkpoint = Folder.at(tmp_path / "whole")
    checkpoint.write_text("model.safetensors", "weights")
    file.write_text("./whole\n")
    before = pool_state(str(file))
    checkpoint.write_text("model.safetensors", "others")
    assert pool_state(str(file)) != before


def test_one_look_gives_what_is_asked_of_a_listing(
    bucket: str, tmp_path: Path, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder, a prefix and a list; each adapter has a state of its own, whatever lies beside or below it."""
    monkeypatch.setattr("pipeline.adapters.pool.SETTLED", 0)
    for place in (Folder.at(tmp_path / "pool"), Folder.at(f"{bucket}/pool")):
        for name in ("a", "b", "a/below"):
            place.write_text(f"{name}/{CONFIG_FILE}", name)
    (tmp_path / "pool" / "list.txt").write_text(f"a\n{bucket}/pool/b\norg/none\n")
    for pool in (str(tmp_path / "pool"), f"{bucket}/pool", str(tmp_path / "pool" / "list.txt")):
        found = look_at(pool, exclude=["b"])
        assert found.state == pool_state(pool)
    states = [one.state for one in found.found]
    assert [bool(state) for state in states] == [True, True, False]
    before = {one.adapter_id: one.state for one in look_at(f"{bucket}/pool").found}
    Folder.at(f"{bucket}/pool").write_text("a/optimizer.state", "no part of an adapter")
    Folder.at(f"{bucket}/pool").write_text(f"a/below/{WEIGHTS_FILE}", "weights")
    store_server.requests.clear()
    after = {one.adapter_id: one.state for one in look_at(f"{bucket}/pool").found}
    assert [name for name, state in after.items() if before[name] != state] == ["a/below"]
    assert not [request for request in store_server.requests if CONFIG_FILE in request]


@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_is_no_state_of_an_adapter(
    bucket: str, tmp_path: Path, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that is done would be done again, without the adapters that cannot be reached at the moment."""
    (tmp_path / "list.txt").write_text(f"{bucket}/far\n")
    monkeypatch.setattr(store_server, "refuse", lambda request: True)
    with pytest.raises(OSError, match="503"):
        pool_state(str(tmp_path / "list.txt"))
