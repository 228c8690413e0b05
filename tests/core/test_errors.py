"""One line for a person."""

import errno

import pytest

from pipeline.adapters.pool import look_at
from pipeline.core.errors import CAUSED, is_transient, one_line
from pipeline.core.storage import Folder


def test_the_last_line_of_an_error_is_what_went_wrong() -> None:
    assert one_line(RuntimeError("in\nthe end\n")) == "RuntimeError: the end"
    assert one_line(RuntimeError()) == "RuntimeError: "


def test_what_ray_says_about_itself_is_left_out() -> None:
    """The texts of Ray Data 2.60 for an error in our code and for one of its own readers."""
    advice = "Failed to apply UDF transform after 1/1 attempts.\nTo change retry attempts, configure `DataContext`."
    worker = f"ray::f()\nValueError: the reason\n\n{CAUSED}:\n\nUserCodeException: UDF failed.\n{advice}"
    assert one_line(RuntimeError(worker)) == "RuntimeError: ValueError: the reason"
    assert one_line(OSError(f"OSError: thrift\nFailed to read fragment a.parquet\n{advice}")).endswith("read fragment a.parquet")


@pytest.mark.usefixtures("impatient")
def test_a_store_that_does_not_answer_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (settings | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).items():  # the discard port: nobody listens
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match="NETWORK_CONNECTION") as caught:
        Folder.at("s3://bucket/run").exists("config.yaml")
    assert one_line(caught.value).startswith("the object store does not answer")
    for ask in (Folder.at("s3://bucket/run").create, lambda: look_at("s3://bucket/pool")):
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):  # which may pass, so that it is no InputError
            ask()


def test_a_full_disk_may_pass_and_a_forbidden_folder_may_not() -> None:
    assert is_transient(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_transient(PermissionError(errno.EACCES, "Permission denied"))
    assert not is_transient(OSError("AWS Error ACCESS_DENIED during CreateBucket operation"))


def test_refused_credentials_are_said_to_be_so() -> None:
    error = OSError("When reading 'key': AWS Error ACCESS_DENIED during GetObject operation: No response body.")
    assert one_line(error).startswith("the object store refuses these credentials")
