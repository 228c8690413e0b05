"""The node's cache of adapters: fetched once by whoever asks, whole or not at all, within its bytes, never taken from a user."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from pyarrow import fs
from store_server import StoreServer

from pipeline.adapters import pool
from pipeline.adapters.cache import MAX_CARD_BYTES, PARTIAL, AdapterCache
from pipeline.core.errors import AdapterError, InputError
from pipeline.core.file_names import CONFIG_FILE, FILES, WEIGHTS_FILE
from pipeline.core.storage import Folder

WAIT = 60  # seconds until an event that does not come fails the test
FORK = multiprocessing.get_context("fork")


def put(store: Folder, name: str, weights: str = "weights") -> str:
    """Write an adapter; gives its URI."""
    store.write_text(f"{name}/{CONFIG_FILE}", "{}")
    store.write_text(f"{name}/{WEIGHTS_FILE}", weights)
    return store.sub(name).uri


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AdapterCache]:
    with closing(AdapterCache(tmp_path / "cache")) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """An object store of which a local folder keeps the files; a forked process can read it too."""
    monkeypatch.setattr(
        "pipeline.adapters.cache.locate", lambda uri, _: Folder(uri, uri.replace("disk:/", str(tmp_path)), fs.LocalFileSystem())
    )
    return Folder("disk://store", str(tmp_path / "store"), fs.LocalFileSystem())


@pytest.fixture
def on_download(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, Path], None]], None]:
    """on_download(hook): call hook(uri, target) at the start of every download."""
    download = Folder.download

    def install(hook: Callable[[str, Path], None]) -> None:
        def hooked(self: Folder, names: list[str], target: Path) -> None:
            hook(self.uri, target)
            download(self, names, target)

        monkeypatch.setattr(Folder, "download", hooked)

    return install


@pytest.fixture
def downloads(on_download: Callable[..., None]) -> list[str]:
    """The URIs of all downloads of this process, as they start."""
    seen: list[str] = []
    on_download(lambda uri, target: seen.append(uri))
    return seen


def in_fork(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=work, daemon=True)
    process.start()
    return process


def test_an_adapter_that_is_too_large_is_refused_before_it_is_fetched(
    store: Folder, downloads: list[str], tmp_path: Path
) -> None:
    cache = AdapterCache(tmp_path / "cache", max_adapter_bytes=20)
    with pytest.raises(AdapterError, match="it has 22 bytes; 20 are allowed"):
        cache.get(put(store, "huge", "w" * 20))
    assert downloads == []
    cache.get(put(store, "small"))


def kept(cache: AdapterCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_an_adapter_of_an_object_store_comes_without_its_other_files_and_once(
    bucket: str, cache: AdapterCache, downloads: list[str]
) -> None:
    store = Folder.at(f"{bucket}/pool")
    for name in (*FILES, "optimizer.pt"):
        store.write_text(f"a/{name}", f"content of {name}")
    with cache.lease(f"{bucket}/pool/a/") as folder:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: f"content of {name}" for name in FILES}
    assert cache.get(f"{bucket}/pool/a/") == folder
    assert len(downloads) == 1
    assert kept(cache) == [folder.name]


def test_what_a_check_refuses_is_fetched_no_further(
    bucket: str, store_server: StoreServer, downloads: list[str], tmp_path: Path
) -> None:
    """It sees all but the weights, and of these the header in a file of their size; what is let through is whole."""
    weights = (2).to_bytes(8, "little") + b"{}" + bytes(range(256)) * 400
    seen, refused = list[dict[str, bytes]](), {"a"}

    def check(folder: Path) -> None:
        seen.append({file.name: file.read_bytes() for file in folder.iterdir()})
        if refused:
            raise AdapterError("not this one")

    uri = put(Folder.at(bucket), "a")
    Folder.at(bucket).write_bytes(f"a/{WEIGHTS_FILE}", weights)
    with closing(AdapterCache(tmp_path / "cache", check=check)) as cache:
        store_server.sent.clear()
        with pytest.raises(AdapterError, match="not this one"):
            cache.get(uri)
        assert [size for request, size in store_server.sent if request.startswith("GET") and WEIGHTS_FILE in request] == [8, 2]
        assert kept(cache) == []
        refused.clear()
        assert (cache.get(uri) / WEIGHTS_FILE).read_bytes() == weights
    assert seen == [{CONFIG_FILE: b"{}", WEIGHTS_FILE: weights[:10] + bytes(len(weights) - 10)}] * 2
    assert (AdapterCache(tmp_path / "cache", check=check).get(uri) / WEIGHTS_FILE).read_bytes() == weights
    assert len(seen) == len(downloads) == 2


def test_weights_that_change_while_they_are_looked_at_are_not_taken(store: Folder, tmp_path: Path) -> None:
    """Neither longer nor shorter ones."""
    uri = put(store, "a", "w" * 100)
    for size in (50, 150):

        def change(folder: Path, size: int = size) -> None:
            with (Path(store.path) / "a" / WEIGHTS_FILE).open("r+b") as file:
                file.truncate(size)

        with closing(AdapterCache(tmp_path / "cache", check=change)) as cache:
            with pytest.raises(AdapterError, match="it changed meanwhile"):
                cache.get(uri)
            assert kept(cache) == []
        put(store, "a", "w" * 100)


def test_a_card_that_is_larger_than_any_is_not_fetched(store: Folder, cache: AdapterCache) -> None:
    uri = put(store, "a")
    store.write_bytes("a/README.md", b"-" * (MAX_CARD_BYTES + 1))
    assert "README.md" not in {file.name for file in cache.get(uri).iterdir()}
    store.write_bytes("a/README.md", b"-" * MAX_CARD_BYTES)
    assert "README.md" in {file.name for file in cache.get(uri).iterdir()}


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_the_state_of_a_held_adapter_is_that_of_the_pool_until_it_changes(
    place: str, tmp_path: Path, bucket: str, cache: AdapterCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SETTLED", -(10**12))  # not even what has a time to come is too new
    store = Folder.at(tmp_path / "pool" if place == "disk" else bucket)
    uri = put(store, "a")
    indexed = {one.adapter_id: one.state for one in pool.look_at(store.uri).found}["a"]
    assert indexed is not None
    assert cache.hold(uri).state == indexed
    put(store, "a", "others")
    assert cache.hold(uri).state not in (indexed, None)


def test_a_changed_adapter_is_fetched_anew(bucket: str, cache: AdapterCache) -> None:
    store = Folder.at(bucket)
    old = cache.get(put(store, "a", "old"))
    new = cache.get(put(store, "a", "newer"))
    assert (old / WEIGHTS_FILE).read_text() == "old"
    assert (new / WEIGHTS_FILE).read_text() == "newer"


def test_an_adapter_that_is_missing_is_named_and_stops_no_other(bucket: str, cache: AdapterCache) -> None:
    there = put(Folder.at(bucket), "there")
    absent = [f"{bucket}/absent", "s3://no-such-bucket/a", "nope://x/y"]
    cache.prefetch([*absent, there])
    for uri in absent * 2:  # the second time without a prefetch
        with pytest.raises(AdapterError, match=f"cannot be fetched from {uri}"):
            cache.get(uri)
    assert (cache.get(there) / WEIGHTS_FILE).read_text() == "weights"


@pytest.mark.usefixtures("impatient")
def test_a_store_that_does_not_answer_says_nothing_of_an_adapter(
    bucket: str, cache: AdapterCache, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put(Folder.at(bucket), "a")
    monkeypatch.setattr(store_server, "refuse", lambda request: True)
    with pytest.raises(OSError, match="503"):  # and no AdapterError
        cache.get(uri)
    monkeypatch.setattr(store_server, "refuse", lambda request: False)
    assert (cache.get(uri) / WEIGHTS_FILE).read_text() == "weights"


def test_local_adapters_are_used_in_place(tmp_path: Path, cache: AdapterCache) -> None:
    uri = put(Folder.at(tmp_path), "a")
    cache.prefetch([uri])
    assert cache.get(uri) == cache.get(f"file://{uri}") == Path(uri)
    cache.release(uri)
    assert kept(cache) == []


def test_two_threads_that_ask_for_one_adapter_fetch_it_once(
    store: Folder, cache: AdapterCache, on_download: Callable[..., None]
) -> None:
    uri = put(store, "a")
    asked = threading.Semaphore(0)
    seen: list[str] = []

    def hook(uri: str, target: Path) -> None:
        seen.append(uri)
        assert asked.acquire(timeout=WAIT)
        assert asked.acquire(timeout=WAIT)

    def ask() -> Path:
        asked.release()
        return cache.get(uri)

    on_download(hook)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(ask), threads.submit(ask)
    assert first.result() == second.result()
    assert seen == [uri]


def test_two_processes_that_ask_for_one_adapter_fetch_it_once(
    tmp_path: Path, store: Folder, on_download: Callable[..., None]
) -> None:
    uri = put(store, "a")
    asked = FORK.Semaphore(0)
    log = tmp_path / "log"

    def hook(uri: str, target: Path) -> None:
        with log.open("a") as file:
            file.write("fetched\n")
        assert asked.acquire(timeout=WAIT)
        assert asked.acquire(timeout=WAIT)

    def ask() -> None:
        asked.release()
        assert (AdapterCache(tmp_path / "cache").get(uri) / WEIGHTS_FILE).read_text() == "weights"

    on_download(hook)
    processes = [in_fork(ask), in_fork(ask)]
    for process in processes:
        process.join(WAIT)
    assert [process.exitcode for process in processes] == [0, 0]
    assert log.read_text() == "fetched\n"


@pytest.mark.parametrize("then", ["a", "b"])
def test_what_a_killed_process_left_is_not_used_and_does_not_stay(
    then: str, store: Folder, cache: AdapterCache, on_download: Callable[..., None]
) -> None:
    uris = {name: put(store, name) for name in "ab"}

    def die_half_way(uri: str, target: Path) -> None:
        target.mkdir()
        (target / WEIGHTS_FILE).write_text("wei")
        os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        on_download(die_half_way)
        cache.get(uris["a"])

    process = in_fork(doomed)
    process.join(WAIT)
    assert process.exitcode == -signal.SIGKILL
    [left] = kept(cache)
    assert left.endswith(PARTIAL)
    folder = cache.get(uris[then])
    assert (folder / WEIGHTS_FILE).read_text() == "weights"
    assert kept(cache) == [folder.name]


def test_a_download_that_fails_leaves_nothing(store: Folder, cache: AdapterCache, on_download: Callable[..., None]) -> None:
    uri = put(store, "a")
    on_download(lambda uri, target: put(store, "a", "changed while it is fetched"))
    with pytest.raises(AdapterError, match=f"{uri} .it changed meanwhile"):
        cache.get(uri)
    assert kept(cache) == []


def test_an_adapter_that_lost_a_file_is_fetched_anew(store: Folder, cache: AdapterCache) -> None:
    uri = put(store, "a")
    with cache.lease(uri) as folder:
        (folder / WEIGHTS_FILE).unlink()
    with cache.lease(uri) as folder:
        assert (folder / WEIGHTS_FILE).read_text() == "weights"


def test_the_bytes_stay_below_the_limit_and_what_was_used_last_stays(tmp_path: Path, store: Folder, downloads: list[str]) -> None:
    limit = 3 * len("{}weights")
    cache = AdapterCache(tmp_path / "cache", max_bytes=limit)
    uris = [put(store, f"a{n}") for n in range(12)]
    for uri in uris:
        for wanted in (uris[0], uri):
            with cache.lease(wanted):
                assert sum(path.stat().st_size for path in cache.folder.glob("*/*")) <= limit
    assert downloads == uris
    downloads.clear()
    for uri in (uris[0], uris[-1], uris[-2], uris[1]):
        cache.get(uri)
    assert downloads == [uris[1]]


@pytest.mark.parametrize("already", [0, 4096])
def test_a_large_cache_is_looked_through_once_in_some_fetches(
    tmp_path: Path, store: Folder, monkeypatch: pytest.MonkeyPatch, already: int
) -> None:
    size, look, looks = len("{}weights"), AdapterCache._clear, list[int]()

    def counted(cache: AdapterCache) -> int:
        looks.append(look(cache))
        return looks[-1]

    monkeypatch.setattr(AdapterCache, "_clear", counted)
    caches = [AdapterCache(tmp_path / "cache", max_bytes=4096 * size) for _ in range(2)]
    for n in range(already):
        (tmp_path / "cache" / f"{n:032}-{size}").mkdir()
    for n in range(96):
        with caches[n % 2].lease(put(store, f"a{n}")):
            assert len(list((tmp_path / "cache").iterdir())) <= 4096
    assert len(looks) <= 96 / 4


def test_what_is_in_use_is_not_removed(tmp_path: Path, store: Folder) -> None:
    """A lock belongs to an open handle: two caches of one process are to each other as those of two processes."""
    mine, other = (AdapterCache(tmp_path / "cache", max_bytes=1) for _ in range(2))
    uris = [put(store, f"a{n}") for n in range(4)]
    got, leased = mine.get(uris[0]), other.get(uris[1])
    mine.prefetch([uris[2]])
    prefetched = mine.get(uris[2])
    assert got.exists()
    assert leased.exists()
    mine.release(uris[0])
    mine.get(uris[3])
    assert not got.exists()
    assert leased.exists()
    assert prefetched.exists()


def test_prefetch_returns_at_once_and_fetches_side_by_side(
    bucket: str, cache: AdapterCache, on_download: Callable[..., None]
) -> None:
    uris = [put(Folder.at(bucket), name) for name in "ab"]
    together = threading.Barrier(3)  # both downloads, and this test after `prefetch`
    on_download(lambda uri, target: together.wait(WAIT))
    cache.prefetch(uris)
    together.wait(WAIT)
    assert all((cache.get(uri) / WEIGHTS_FILE).exists() for uri in uris)


def test_no_more_are_fetched_ahead_than_may_wait(tmp_path: Path, store: Folder, downloads: list[str]) -> None:
    cache = AdapterCache(tmp_path / "cache", max_bytes=1, threads=1, ahead=2)
    uris = [put(store, f"a{n}") for n in range(5)]
    cache.prefetch(uris)
    cache.get(uris[4])
    cache.get(uris[1])  # after uris[0], as there is one thread
    assert sorted(downloads) == [uris[0], uris[1], uris[4]]
    cache.release(uris[0])  # not wanted after all
    cache.prefetch(uris[2:4])
    cache.get(uris[3])
    assert sorted(downloads) == uris
    assert len(kept(cache)) == 4
    cache.close()
    AdapterCache(cache.folder, max_bytes=1).get(put(store, "b"))
    assert len(kept(cache)) == 1


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    assert AdapterCache(tmp_path / "mine").folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("open", "link"):
        with pytest.raises(InputError, match="others can write to it"):
            AdapterCache(tmp_path / name)
