"""What is uploaded to an object store: how many requests it takes, and what a store that fails leaves."""

import errno
from pathlib import Path

import pyarrow as pa
import pytest
from store_server import StoreServer
from writers import PART, WRITES, check, content

from pipeline.core import uploads
from pipeline.core.storage import Folder


@pytest.mark.parametrize("refused", ["partNumber=3", "POST /{path}?uploadId", "?uploads"])
@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_half_way_keeps_the_old_object(
    refused: str, bucket: str, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(uploads, "PART_BYTES", PART)
    place = Folder.at(f"{bucket}/run")
    WRITES["copy_file"](place, 1)
    mark = refused.format(path=place.join("file"))
    monkeypatch.setattr(store_server, "refuse", lambda request: mark in request and not request.startswith("DELETE"))
    with pytest.raises(OSError, match=r"run/file: cannot be written .*503") as raised:
        WRITES["copy_file"](place, 2)
    assert raised.value.errno == errno.EIO  # it may pass
    check(place.read_bytes("file"))
    assert place.read_bytes("file") == content(1, 6 * PART)


def test_a_store_that_fails_for_a_moment_is_asked_again(
    bucket: str, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, refusals = Folder.at(f"{bucket}/run"), iter([True, True])
    monkeypatch.setattr(store_server, "refuse", lambda request: request.startswith("PUT") and next(refusals, False))
    place.write_text("file", "x")
    assert place.read_text("file") == "x"
    assert next(refusals, None) is None


def test_a_small_file_is_one_request(bucket: str, store_server: StoreServer, tmp_path: Path) -> None:
    place = Folder.at(f"{bucket}/deep/er/run")
    (tmp_path / "file").write_text("x")
    for write in (
        lambda: place.write_json("a.json", {}),
        lambda: place.write_text("a.txt", ""),
        lambda: place.write_table("a.parquet", pa.table({"n": [1]})),
        lambda: place.copy_file("file", Folder.at(tmp_path)),
        lambda: place.upload(tmp_path, "folder"),
        lambda: WRITES["a stream of Ray's"](place, 1),
    ):
        store_server.requests.clear()
        write()
        assert [request.split()[0] for request in store_server.requests] == ["PUT"]


def test_a_bucket_that_is_not_there_and_a_key_that_is_refused_are_said(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such-bucket/a: cannot be written .*bucket does not exist"):
        Folder.at("s3://no-such-bucket").write_text("a", "x")
    uploads._s3.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(PermissionError, match="ACCESS_DENIED: no AWS credentials are found"):
        Folder.at("s3://no-such-bucket").write_text("a", "x")
    uploads._s3.cache_clear()
