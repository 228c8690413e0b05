"""Folders on a local disk and on an S3 server: the same behaviour, whole files only."""

import gzip
import json
import os
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from pipeline.core.errors import InputError
from pipeline.core.storage import LISTED_APART, Folder, has_secret, lies_in, without_secret

SCHEMA = pa.schema([("n", pa.int64())])


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder.at(tmp_path / "run")
    return Folder.at(f"{request.getfixturevalue('bucket')}/run")


def test_documents_come_back_as_written(folder: Folder) -> None:
    folder.write_text("a/b.txt", "grüße\n")
    folder.write_json("c.json", {"x": [1, None]})
    folder.write_table("t.parquet", pa.table({"n": [1, 2]}))
    assert folder.read_text("a/b.txt") == "grüße\n"
    assert folder.read_json("c.json") == {"x": [1, None]}
    assert folder.read_table("t.parquet").to_pydict() == {"n": [1, 2]}
    assert folder.sub("a").read_text("b.txt") == "grüße\n"
    assert folder.sub("a").uri == f"{folder.uri}/a"


def test_what_is_there_and_what_is_not(folder: Folder) -> None:
    assert not folder.exists("a.txt")
    assert folder.list_files() == []
    folder.write_text("b.txt", "x")
    folder.write_text("a.txt", "x")
    folder.write_text("sub/c.txt", "x")
    assert folder.exists()
    assert folder.exists("a.txt")
    assert folder.list_files() == ["a.txt", "b.txt"]
    assert folder.list_files(".json") == []


def test_writing_again_replaces(folder: Folder) -> None:
    folder.write_text("a.txt", "long content")
    folder.write_text("a.txt", "new")
    assert folder.read_text("a.txt") == "new"
    assert folder.list_files() == ["a.txt"]


def test_what_is_half_written_is_not_listed(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.write_text("a.txt", "x")
    (tmp_path / ".0123456789abcdef.partial").write_text("hal")
    (tmp_path / "taxes.partial").write_text("a user's own")
    assert folder.list_files() == ["a.txt", "taxes.partial"]
    assert [one.base_name for one in sorted(folder.walk(), key=lambda one: one.path)] == ["a.txt", "taxes.partial"]
    assert len(folder.state()) == 2


def test_what_a_killed_process_left_half_written_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, age in (("deep/.old.partial", 3700), (".new.partial", 3500), ("old.partial", 3700)):
        (tmp_path / name).write_text("hal")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    Folder.at(tmp_path).sweep(now=1e9)
    assert sorted(path.name for path in tmp_path.rglob("*.partial")) == [".new.partial", "old.partial"]


def test_who_reads_while_another_writes_gets_one_whole_version(bucket: str) -> None:
    folder = Folder.at(f"{bucket}/run")
    folder.write_text("stages.json", "{}")
    later = ['{"stage": "index"}', '{"stage": "index", "seconds": 1}']

    def open_input_stream(path: str) -> Any:
        stream = folder.files.open_input_stream(path)  # asks for the size
        if later:
            folder.write_text("stages.json", later.pop(0))
        return stream

    busy = Folder(folder.uri, folder.path, cast(Any, SimpleNamespace(open_input_stream=open_input_stream)))
    assert busy.read_json("stages.json") == {"stage": "index", "seconds": 1}
    assert later == []


def test_a_question_mark_is_a_sign_like_others_on_a_disk(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "what?is").sub("run")
    folder.write_text("a.txt", "x")
    assert folder.uri == str(tmp_path / "what?is" / "run")
    assert Folder.at(folder.uri).read_text("a.txt") == "x"


@pytest.mark.parametrize("text", ["s3:/bucket/x", "gs:/bucket", "hf:/org/name"])
def test_a_slash_that_is_missing_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="two slashes"):
        Folder.at(text)


def test_delete_removes_files_and_folders_and_minds_nothing_missing(folder: Folder) -> None:
    folder.write_text("a.txt", "x")
    folder.write_text("sub/b.txt", "x")
    for name in ("a.txt", "sub", "missing"):
        folder.delete(name)
    assert not folder.exists("a.txt")
    assert not folder.exists("sub/b.txt")


def test_a_data_set_is_all_parquet_files_of_a_folder(folder: Folder) -> None:
    assert folder.sub("scores").dataset(SCHEMA).to_table().num_rows == 0
    for number in range(3):
        folder.write_table(f"scores/{number}.parquet", pa.table({"n": [number]}, schema=SCHEMA))
    assert sorted(folder.sub("scores").dataset(SCHEMA).to_table()["n"].to_pylist()) == [0, 1, 2]


def test_folders_are_copied_there_and_named_files_back(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"\x00\x01")
    (source / "deep" / "b.txt").write_text("b")
    folder.upload(source, "copy")
    assert folder.read_text("copy/deep/b.txt") == "b"
    folder.sub("copy").download(["a.bin", "missing"], tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["a.bin"]
    assert (tmp_path / "back" / "a.bin").read_bytes() == b"\x00\x01"
    folder.copy_file("a.bin", folder.sub("copy"))
    assert folder.read_bytes("a.bin") == b"\x00\x01"


def test_a_compressed_file_is_written_and_copied_as_it_is(folder: Folder) -> None:
    folder.write_bytes("copy/a.gz", gzip.compress(b"text"))
    folder.copy_file("a.gz", folder.sub("copy"))
    assert folder.read_bytes("copy/a.gz") == folder.read_bytes("a.gz") == b"text"  # pyarrow goes by the name


def test_a_file_that_cannot_be_copied_leaves_nothing(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.copy_file("a.bin", folder.sub("missing"))
    assert not folder.exists("a.bin")


def test_a_folder_travels_to_a_worker(folder: Folder) -> None:
    folder.write_text("a.txt", "x")
    assert pickle.loads(pickle.dumps(folder)).read_text("a.txt") == "x"


def test_a_folder_that_is_a_file_is_read_by_the_empty_name(folder: Folder) -> None:
    folder.write_text("list.txt", "one\n")
    assert Folder.at(f"{folder.uri}/list.txt").read_text("") == "one\n"


def test_a_failed_write_leaves_the_old_file_and_no_whole_new_one(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.write_text("a.txt", "old")
    with pytest.raises(TypeError):
        folder.write_bytes("a.txt", 5)  # type: ignore[arg-type]
    assert folder.read_text("a.txt") == "old"
    assert folder.list_files(".txt") == ["a.txt"]


def test_tilde_and_trailing_slash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder.at("~/run/").uri == str(tmp_path / "run")
    assert Folder.at("/").path == "/"


def test_options_of_a_uri_stay_behind_the_path_of_a_sub_folder(object_store: str) -> None:
    folder = Folder.at(f"s3://bucket/run?endpoint_override={object_store}").sub("a", "b")
    assert (folder.path, folder.uri) == ("bucket/run/a/b", f"s3://bucket/run/a/b?endpoint_override={object_store}")


def test_an_unknown_location_is_an_input_error() -> None:
    with pytest.raises(InputError, match="nope://bucket/x: cannot open this location"):
        Folder.at("nope://bucket/x")


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write here"):
        Folder.at(tmp_path / "file" / "run").create()


def test_create_makes_the_folder(tmp_path: Path) -> None:
    Folder.at(tmp_path / "a" / "b").create()
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("folders", [0, 2, LISTED_APART + 1])
def test_every_file_at_any_depth_is_found(folder: Folder, folders: int) -> None:
    names = ["top", *(f"{place}/{name}" for place in range(folders) for name in ("a", "deep/er/b"))]
    for name in names:
        folder.write_text(name, "")
    assert sorted(info.path.removeprefix(f"{folder.path}/") for info in folder.walk()) == sorted(names)


def test_credentials_in_a_location_are_refused_and_not_shown() -> None:
    with pytest.raises(InputError, match=r"s3://\.\.\.@bucket/runs: .*no credentials") as caught:
        Folder.at("s3://KEY:SECRET@bucket/runs")
    assert "SECRET" not in str(caught.value)
    assert without_secret("see s3://bucket/a@b and me@example.org") == "see s3://bucket/a@b and me@example.org"


def test_the_state_tells_when_anything_below_changed(folder: Folder) -> None:
    assert folder.state() == []
    folder.write_text("a.txt", "x")
    folder.write_text("deep/down/b.txt", "xy")
    first = folder.state()
    assert [(path.removeprefix(folder.path), size) for path, size, _ in first] == [("/a.txt", 1), ("/deep/down/b.txt", 2)]
    assert folder.state() == first
    assert folder.sub("a.txt").state() == first[:1]
    folder.write_text("deep/down/b.txt", "xyz")
    assert folder.state() != first


def test_when_a_file_was_written(folder: Folder) -> None:
    assert folder.modified("a.txt") is None
    folder.write_text("a.txt", "x")
    when = folder.modified("a.txt")
    assert when is not None
    assert [time / 1e9 for _, _, time in folder.state()] == [when]


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "hf://org/name", "http://host/x", "nope://x"])
def test_a_location_that_is_none_is_an_input_error(uri: str) -> None:
    with pytest.raises(InputError, match=f"^{uri}: cannot open this location"):
        Folder.at(uri)


def test_a_file_uri_is_a_local_path_and_an_unknown_user_a_folder_of_that_name(tmp_path: Path) -> None:
    assert Folder.at(f"file://{tmp_path}").uri == str(tmp_path)
    assert Folder.at("~no-such-user/x").path.endswith("/~no-such-user/x")


def test_credentials_are_told_from_the_name_of_a_public_bucket() -> None:
    assert has_secret("s3://KEY:SECRET@bucket/x")
    assert not has_secret("gs://anonymous@bucket/x")


@pytest.mark.parametrize(
    ("path", "folder", "inside"),
    [
        ("a/b", "a", True),
        ("a", "a/", True),
        ("ab", "a", False),
        ("a/../b", "a", False),
        ("s3://b/a/x", "s3://b/a?region=x", True),
    ],
)
def test_what_lies_in_a_folder(path: str, folder: str, inside: bool) -> None:
    assert lies_in(path, folder) == inside


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_safetensors_file_that_is_cut_short_is_not_whole(folder: Folder, keep: int) -> None:
    content = save({"a": torch.ones(3), "b": torch.zeros(0)}, metadata={"format": "pt"})
    folder.write_bytes("mashup/weights.safetensors", content)
    assert folder.is_complete("mashup/weights.safetensors")
    folder.write_bytes("mashup/weights.safetensors", content[:keep])
    assert not folder.is_complete("mashup")


def test_a_document_that_is_cut_short_is_named(folder: Folder) -> None:
    folder.write_text("a.json", '{"x": ')
    with pytest.raises(ValueError, match=r"a\.json: no valid JSON"):
        folder.read_json("a.json")


def test_folders_of_a_bucket_share_a_client_and_its_credentials(
    bucket: str, object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials as a pod gets them, from a server beside it, which counts how often it is asked."""
    asked: list[str] = []
    keys = {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Expiration": "2100-01-01T00:00:00Z"}

    class Credentials(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(keys).encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Credentials) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_port}/keys")
        try:
            for number in range(8):
                assert not Folder.at(f"{bucket}/{number}").exists("none")
        finally:
            server.shutdown()
            thread.join()
    assert len(asked) <= 2  # one that asks for the region of the bucket, and the one that all use


def test_who_asks_as_somebody_else_has_a_client_of_his_own(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Folder.at(bucket).files
    assert Folder.at(f"{bucket}/deeper").files is mine
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another")
    assert Folder.at(bucket).files is not mine
