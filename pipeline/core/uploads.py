"""Whole objects in S3 and Google Cloud Storage, through obstore: an object is there once it is whole, or not at all.

pyarrow makes an object of whatever was written to a stream, however the writing ended: leaving its `with` by an exception, such
as the SystemExit of a SIGTERM, completes the upload. obstore sends what fits one request as one PUT, and aborts a larger upload
that is broken off. Only after a SIGKILL do its parts stay in the store, seen by nobody: a lifecycle rule of the bucket ends them.

pyarrow reads everything; it is asked for the endpoint and the region, so that both clients work on the same place.
"""

import errno
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

if TYPE_CHECKING:  # obstore itself is imported by who writes to a store
    from obstore.store import GCSStore, RetryConfig, S3Store

PART_BYTES = 16 << 20
"""What is sent in one request. S3 takes 10,000 parts of an object: 160 GB."""
PARTS_AT_ONCE = 4
"""Parts of an upload that are on their way, and in memory, at the same time."""
RETRIES: "RetryConfig" = {"max_retries": 20, "retry_timeout": timedelta(minutes=2)}
TIMEOUT = timedelta(seconds=120)
"""For one request."""
CREDENTIALS = timedelta(minutes=10)
"""After which credentials are asked for again; botocore renews them when they have less than that left."""
PASSING = re.compile(r"HTTP error|status code: (5\d\d|429)")
"""In errors of a store that may have passed a minute later."""


def takes(files: fs.FileSystem) -> bool:
    """Whether a file system is an object store that this module writes to."""
    return isinstance(files, fs.S3FileSystem | fs.GcsFileSystem)


Settings = tuple[tuple[str, str], ...]


def client_settings() -> Settings:
    """The environment's variables that say where a store is, and who asks: a client is shared by those who have the same."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(("AWS_", "GOOGLE_"))))


def put(files: fs.FileSystem, path: str, pieces: Iterator[bytes]) -> None:
    """Write an object; the one that is there before stays until the new one is whole.

    Args:
        path: bucket/key.
        pieces: of PART_BYTES each, but for the last. What they raise is raised, and nothing is written.

    Raises:
        OSError: the store refuses, or does not answer; then with errno EIO.
    """
    import obstore
    from obstore.exceptions import BaseError

    bucket, _, key = path.partition("/")
    store = _store(files, bucket)
    first, second = next(pieces, b""), next(pieces, b"")
    try:
        if second:
            parts = chain((first, second), pieces)
            obstore.put(store, key, parts, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        else:
            obstore.put(store, key, first, use_multipart=False)
    except (BaseError, FileNotFoundError) as error:
        raise _as_os_error(path, error) from error


def options(files: fs.FileSystem) -> dict[str, Any]:
    """What one of pyarrow's file systems was made with: of an object store the place and the way to it."""
    for kind in (fs.S3FileSystem, fs.GcsFileSystem):
        if isinstance(files, kind):
            found: dict[str, Any] = kind.__reduce__(files)[1][0]
            return found
    return {}


def _as_os_error(path: str, error: Exception) -> OSError:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    said = " ".join(str(error).partition("Debug source")[0].split())
    text = f"{path}: cannot be written ({said})"
    if isinstance(error, FileNotFoundError):  # the bucket, or what the pieces are read from
        return FileNotFoundError(errno.ENOENT, text)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return PermissionError(errno.EACCES, f"ACCESS_DENIED: {text}")
    return OSError(errno.EIO if PASSING.search(said) else errno.EINVAL, text)


def _store(files: fs.FileSystem, bucket: str) -> "S3Store | GCSStore":
    asked = options(files)
    if isinstance(files, fs.S3FileSystem):
        where = (asked[name] for name in ("endpoint_override", "scheme", "region", "tls_ca_file_path"))
        return _s3(client_settings(), bucket, *where)
    return _gcs(client_settings(), bucket, *(asked[name] for name in ("endpoint_override", "scheme", "anonymous")))


@lru_cache
def _s3(settings: Settings, bucket: str, endpoint: str, scheme: str, region: str, certificates: str) -> "S3Store":
    from obstore.store import S3Store

    # By names of hosts, as pyarrow has it, unless the endpoint is somebody else's.
    where: dict[str, Any] = {"virtual_hosted_style_request": "." not in bucket}
    if endpoint:
        where = {"endpoint": endpoint if "://" in endpoint else f"{scheme}://{endpoint}"}
    trusted: Any = {"root_certificate": Path(certificates).read_bytes()} if certificates else {}
    return S3Store(
        bucket,
        region=region,
        credential_provider=_aws_credentials(),
        client_options=trusted | {"allow_http": True, "timeout": TIMEOUT},
        retry_config=RETRIES,
        **where,
    )


@lru_cache
def _gcs(settings: Settings, bucket: str, endpoint: str, scheme: str, anonymous: bool) -> "GCSStore":
    from obstore.store import GCSStore

    where: dict[str, Any] = {"base_url": f"{scheme}://{endpoint}"} if endpoint else {}
    options: Any = {"allow_http": True, "timeout": TIMEOUT}
    return GCSStore(bucket, skip_signature=anonymous, client_options=options, retry_config=RETRIES, **where)


def _aws_credentials() -> Any:
    """The AWS tools' own chain, as pyarrow has it: environment, files of a profile, SSO, roles of pods and machines."""
    from obstore.auth.boto3 import Boto3CredentialProvider  # boto3 takes a third of a second to import

    try:
        return Boto3CredentialProvider(ttl=CREDENTIALS)
    except ValueError as error:
        raise PermissionError(errno.EACCES, "ACCESS_DENIED: no AWS credentials are found") from error
