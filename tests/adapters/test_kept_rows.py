"""Rows of earlier indexes: what is taken from them, what is checked anew, and what that costs at an object store."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from edits import edit_config
from safetensors.torch import load_file, save_file
from store_server import StoreServer

from pipeline.adapters import catalogue, pool
from pipeline.adapters.adapter import Adapter, read_adapter, write_adapter
from pipeline.adapters.cache import AdapterCache
from pipeline.adapters.catalogue import Inspector, build_catalogue, inspect_batch
from pipeline.adapters.fetch import FetchError
from pipeline.adapters.index import _rows_folder, index
from pipeline.adapters.kept_rows import KEPT, KeptRows
from pipeline.adapters.pool import Listed, look_at
from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.core.errors import AdapterError
from pipeline.core.file_names import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.storage import Folder
from pipeline.run_folder import Run

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test writes files and looks at them at once."""
    monkeypatch.setattr(pool, "SETTLED", 0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are checked in this process."""
    monkeypatch.setattr(catalogue, "_inspected", lambda left, given: [inspect_batch(left, **given)] if len(left) else [])


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch, here: None) -> list[str]:
    """The ids of the adapters that are checked, as they are."""
    seen, inspect = list[str](), Inspector.inspect

    def note(self: Inspector, listed: Listed, cache: AdapterCache) -> dict[str, object]:
        seen.append(listed.adapter_id)
        return inspect(self, listed, cache)

    monkeypatch.setattr(Inspector, "inspect", note)
    return seen


@pytest.fixture
def new_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """new_node(): from now on this process is on a node whose cache of adapters is empty."""
    nodes = iter(range(100))

    def move() -> None:
        folder = tmp_path / f"node-{next(nodes)}"
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))

    move()
    return move


@pytest.fixture
def reads(bucket: str, store_server: StoreServer) -> Callable[[], tuple[Counter[str], int]]:
    """reads(): how often each file of an adapter was read since the last call, and how many bytes these were."""
    begin = f"GET /{bucket.removeprefix('s3://')}/pool/"

    def take() -> tuple[Counter[str], int]:
        found = [(request.removeprefix(begin), size) for request, size in store_server.sent if request.startswith(begin)]
        store_server.sent.clear()
        files = [(name, size) for name, size in found if name and "?" not in name]
        return Counter(name for name, _ in files), sum(size for _, size in files)

    take()
    return take


def write_donors(folder: Path, base: str, make: Make, names: list[str]) -> Path:
    """Adapters of unlike weights; gives the folder back."""
    like = read_adapter(make(folder / names[0], base))
    (folder / names[0] / CARD_FILE).unlink()
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            module: (torch.randn(a_RI.shape, generator=generator), torch.randn(b_OR.shape, generator=generator))
            for module, (a_RI, b_OR) in like.tensors.items()
        }
        write_adapter(folder / name, Adapter(like.config, drawn))
    return folder


def spoil(folder: Path, value: float = float("nan")) -> None:
    """Change one weight, and no size."""
    tensors, size = load_file(folder / WEIGHTS_FILE), (folder / WEIGHTS_FILE).stat().st_size
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    assert (folder / WEIGHTS_FILE).stat().st_size == size


def write_mixed(folder: Path, base: str, make: Make) -> Path:
    """Donors, duplicates, a family, an outlier, and adapters that are set aside for one reason or another."""
    write_donors(folder, base, make, [f"donor-{n:02d}" for n in range(10)])
    one = read_adapter(folder / "donor-03")
    for name, size in {"a-twin": 1.0, "half": 0.5, "huge": 1e4}.items():
        write_adapter(folder / name, Adapter(one.config, {m: (a_RI, b_OR * size) for m, (a_RI, b_OR) in one.tensors.items()}))
    for name in ("base", "renamed", "dora", "nan", "pickled", "carded"):
        shutil.copytree(folder / "donor-05", folder / name)
    edit_config(folder / "renamed", base_model_name_or_path="org/another")
    edit_config(folder / "dora", use_dora=True)
    spoil(folder / "nan")
    (folder / "pickled" / WEIGHTS_FILE).rename(folder / "pickled" / "adapter_model.bin")
    (folder / "carded" / CARD_FILE).write_text("---\nlicense: mit\ndatasets: [org/rows]\n---\n")
    shutil.copytree(base, folder / "whole")
    return folder


def test_the_catalogue_is_the_same_whether_rows_are_kept_or_not(
    tiny_base: str, make_adapter: Make, tmp_path: Path, inspected: list[str]
) -> None:
    place, rows = write_mixed(tmp_path / "pool", tiny_base, make_adapter), Folder.at(tmp_path / "rows")
    afresh = build_catalogue(tiny_base, str(place))
    assert set(afresh["status"].to_pylist()) == {"ok", "set_aside"}
    assert any("unusual weights" in str(warning) for warning in afresh["warning"].to_pylist())
    assert build_catalogue(tiny_base, str(place), kept=KeptRows(rows)).equals(afresh)
    inspected.clear()
    assert build_catalogue(tiny_base, str(place), kept=KeptRows(rows)).equals(afresh)
    assert inspected == ["whole"]  # what it is made into goes with the run
    shutil.rmtree(place / "a-twin")
    write_donors(place, tiny_base, make_adapter, ["new"])
    spoil(place / "donor-07")
    (place / "carded" / CARD_FILE).unlink()
    inspected.clear()
    found = build_catalogue(tiny_base, str(place), kept=KeptRows(rows))
    assert sorted(inspected) == ["carded", "donor-07", "new", "whole"]
    assert found.equals(build_catalogue(tiny_base, str(place)))
    assert not found.equals(afresh)


@pytest.mark.usefixtures("here")
def test_of_an_object_store_only_what_is_new_or_changed_is_read_and_once(
    bucket: str,
    tiny_base: str,
    make_adapter: Make,
    tmp_path: Path,
    reads: Callable[[], tuple[Counter[str], int]],
    new_node: Callable[[], None],
) -> None:
    local = write_donors(tmp_path / "local", tiny_base, make_adapter, [f"{n}" for n in range(5)])
    store, rows = Folder.at(f"{bucket}/pool"), Folder.at(f"{bucket}/rows")
    size = sum(file.stat().st_size for file in (local / "0").iterdir())

    def catalogue_of(kept: KeptRows | None) -> pa.Table:
        new_node()
        return build_catalogue(tiny_base, store.uri, kept=kept)

    for name in "0123":
        store.upload(local / name, name)
    once = {CONFIG_FILE: 1, WEIGHTS_FILE: 3}  # the length of the header, the header, the rest
    first = catalogue_of(KeptRows(rows))
    requests, taken = reads()
    assert requests == Counter({f"{name}/{file}": times for name in "0123" for file, times in once.items()})
    assert taken == 4 * size

    assert catalogue_of(KeptRows(rows)).equals(first)
    assert reads() == (Counter(), 0)

    store.upload(local / "4", "4")
    with_new = catalogue_of(KeptRows(rows))
    assert reads() == (Counter({f"4/{file}": times for file, times in once.items()}), size)

    time.sleep(1.1)  # the store tells seconds
    spoil(local / "2", 0.5)
    store.upload(local / "2", "2")
    overwritten = catalogue_of(KeptRows(rows))
    assert reads() == (Counter({f"2/{file}": times for file, times in once.items()}), size)
    old, new = with_new["adapter_hash"].to_pylist(), overwritten["adapter_hash"].to_pylist()
    assert [one == other for one, other in zip(old, new, strict=True)] == [True, True, False, True, True]
    assert catalogue_of(None).equals(overwritten)
    assert len(rows.list_files()) == 1


@pytest.mark.usefixtures("here", "new_node")
def test_the_search_finds_the_weights_on_the_node_that_checked_them(
    bucket: str, tiny_base: str, make_adapter: Make, tmp_path: Path, reads: Callable[[], tuple[Counter[str], int]]
) -> None:
    local = write_donors(tmp_path / "local", tiny_base, make_adapter, ["a"])
    Folder.at(f"{bucket}/pool").upload(local / "a", "a")
    row = build_catalogue(tiny_base, f"{bucket}/pool", kept=KeptRows(Folder.at(tmp_path / "rows"))).to_pylist()[0]
    reads()
    with closing(AdapterCache()) as cache, cache.lease(row["uri"]) as folder:
        assert (folder / WEIGHTS_FILE).read_bytes() == (local / "a" / WEIGHTS_FILE).read_bytes()
    assert reads() == (Counter(), 0)


KILLED = """
import os, signal, sys
from pipeline.adapters import catalogue, pool
from pipeline.adapters.kept_rows import KeptRows
from pipeline.core.storage import Folder

base, place, rows = sys.argv[1:]
pool.SETTLED, catalogue.ADAPTERS_PER_TASK = 0, 3
catalogue._inspected = lambda left, given: [catalogue.inspect_batch(left, **given)]
looks, seen = catalogue.Inspector._looks, []

def look(self, adapter):
    seen.append(adapter)
    if len(seen) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return looks(self, adapter)

catalogue.Inspector._looks = look
catalogue.build_catalogue(base, place, kept=KeptRows(Folder.at(rows)))
"""


@pytest.mark.usefixtures("here")
def test_after_a_kill_what_was_checked_is_not_read_again(
    bucket: str,
    tiny_base: str,
    make_adapter: Make,
    tmp_path: Path,
    reads: Callable[[], tuple[Counter[str], int]],
    new_node: Callable[[], None],
) -> None:
    names = [f"{n}" for n in range(9)]
    local = write_donors(tmp_path / "local", tiny_base, make_adapter, names)
    for name in names:
        Folder.at(f"{bucket}/pool").upload(local / name, name)
    command = [sys.executable, "-c", KILLED, tiny_base, f"{bucket}/pool", f"{bucket}/rows"]
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == -signal.SIGKILL
    reads()
    found = build_catalogue(tiny_base, f"{bucket}/pool", kept=KeptRows(Folder.at(f"{bucket}/rows")))
    assert {name.partition("/")[0] for name in reads()[0]} == {"6", "7", "8"}
    new_node()
    assert found.equals(build_catalogue(tiny_base, f"{bucket}/pool"))


def break_header(folder: Path) -> None:
    weights = bytearray((folder / WEIGHTS_FILE).read_bytes())
    weights[0:8] = (1 << 40).to_bytes(8, "little")
    (folder / WEIGHTS_FILE).write_bytes(weights)


def cast(folder: Path, kind: torch.dtype) -> None:
    save_file({name: weight.to(kind) for name, weight in load_file(folder / WEIGHTS_FILE).items()}, folder / WEIGHTS_FILE)


REFUSED: dict[str, Callable[[Path], object]] = {
    "DoRA": lambda folder: edit_config(folder, use_dora=True),
    "rank": lambda folder: edit_config(folder, r=5),
    "no-JSON": lambda folder: (folder / CONFIG_FILE).write_text("{"),
    "no-config": lambda folder: (folder / CONFIG_FILE).unlink(),
    "targets": lambda folder: edit_config(folder, target_modules=["q_proj"]),
    "length": break_header,
    "integers": lambda folder: cast(folder, torch.int32),
    "cut-short": lambda folder: os.truncate(folder / WEIGHTS_FILE, (folder / WEIGHTS_FILE).stat().st_size - 5_000),
}


@pytest.mark.usefixtures("here", "new_node")
def test_what_is_refused_by_its_header_costs_no_weights_and_has_the_reason_that_it_has_on_a_disk(
    bucket: str, tiny_base: str, make_adapter: Make, tmp_path: Path, reads: Callable[[], tuple[Counter[str], int]]
) -> None:
    local = write_donors(tmp_path / "local", tiny_base, make_adapter, ["good", "nan", *REFUSED])
    spoil(local / "nan")
    for name, harm in REFUSED.items():
        harm(local / name)
    (local / "DoRA" / CARD_FILE).write_text("---\nlicense: mit\n---\n")
    for folder in local.iterdir():
        Folder.at(f"{bucket}/pool").upload(folder, folder.name)
    found = build_catalogue(tiny_base, f"{bucket}/pool")
    requests, taken = reads()
    here = build_catalogue(tiny_base, str(local))
    assert found.drop(["uri", "state"]).equals(here.drop(["uri", "state"]))
    whole = {"good", "nan"}
    assert {name for name in found["adapter_id"].to_pylist() if requests[f"{name}/{WEIGHTS_FILE}"] > 2} == whole
    small = sum(file.stat().st_size for folder in local.iterdir() for file in folder.iterdir() if file.name != WEIGHTS_FILE)
    weights = sum((local / name / WEIGHTS_FILE).stat().st_size for name in whole)
    assert taken < weights + small + len(REFUSED) * 2000  # their headers
    assert min((local / name / WEIGHTS_FILE).stat().st_size for name in REFUSED) > 5_000
    assert [row["license"] for row in found.to_pylist() if row["adapter_id"] == "DoRA"] == ["mit"]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (FetchError("cannot be fetched"), False),
        (ZeroDivisionError(), False),
        (PermissionError("no"), False),
        (AdapterError("NaN or Inf in the weights"), True),
    ],
)
def test_a_verdict_on_the_way_to_an_adapter_is_not_kept(
    error: Exception,
    kept: bool,
    tiny_base: str,
    make_adapter: Make,
    tmp_path: Path,
    inspected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, rows = write_donors(tmp_path / "pool", tiny_base, make_adapter, ["a", "b"]), Folder.at(tmp_path / "rows")

    def fail(folder: Path, *_: object) -> Adapter:
        if folder.name == "a" and isinstance(error, PermissionError):
            raise AdapterError("cannot be read") from error
        if folder.name == "a":
            raise error
        return read_adapter(folder)

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "read_adapter", fail)
        found = build_catalogue(tiny_base, str(place), kept=KeptRows(rows))
    assert found["status"].to_pylist() == ["set_aside", "ok"]
    inspected.clear()
    again = build_catalogue(tiny_base, str(place), kept=KeptRows(rows))
    assert again["status"].to_pylist() == ["set_aside" if kept else "ok", "ok"]
    assert inspected == ([] if kept else ["a"])


@pytest.mark.usefixtures("ray_session")
def test_runs_that_share_scores_share_rows(
    bucket: str, tiny_base: str, make_adapter: Make, tmp_path: Path, reads: Callable[[], tuple[Counter[str], int]]
) -> None:
    local = write_donors(tmp_path / "local", tiny_base, make_adapter, ["a", "b"])
    for name in "ab":
        Folder.at(f"{bucket}/pool").upload(local / name, name)

    def indexed(name: str, store: str | None) -> Run:
        settings = {"base": tiny_base, "pool": f"{bucket}/pool", "target": TargetConfig(train="train.jsonl")}
        run = Run(Config(run=f"{bucket}/{name}", search=SearchConfig(store=store), **settings))
        index(run)
        return run

    first = indexed("first", f"{bucket}/store")
    assert reads()[1] > 0
    second = indexed("second", f"{bucket}/store")
    assert reads() == (Counter(), 0)
    assert second.folder.read_table("catalogue.parquet").equals(first.folder.read_table("catalogue.parquet"))
    assert not second.folder.sub("rows").is_folder
    assert _rows_folder(indexed("third", None)).list_files()
    assert Folder.at(f"{bucket}/third/rows").is_folder


def test_rows_are_of_one_base_and_one_version_of_the_checks(
    tiny_base: str, untied_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(base: str) -> str:
        config = Config(run=str(tmp_path), base=base, pool="p", target=TargetConfig(train="train.jsonl"))
        return _rows_folder(Run(config)).uri

    places = [place(tiny_base), place(untied_base)]
    assert place(tiny_base) == places[0]
    monkeypatch.setattr("pipeline.adapters.index.CHECKS", 0)
    places.append(place(tiny_base))
    monkeypatch.setattr("peft.__version__", "0")
    places.append(place(tiny_base))
    assert len(set(places)) == 4


def row(name: str, state: str, salt: int) -> dict[str, object]:
    return {"adapter_id": name, "uri": f"/pool/{name}", "status": "ok", "state": state, "salt": salt}


def listed(name: str, state: str | None = "s") -> Listed:
    return Listed(name, f"/pool/{name}", None, state)


def test_files_become_one_and_what_others_have_found_stays(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    KeptRows(folder).blocks.add([row("a", "s", 7), row("b", "s", 7), row("z", "s", 7)])
    mine, other = KeptRows(folder), KeptRows(folder)
    assert mine.salt == 7
    other.blocks.add([row("c", "s", 7)])  # an index that is at work
    mine.blocks.add([row("b", "t", 7)])
    mine.blocks.add([row("d", "", 7)])
    assert mine.of([listed("a"), listed("b", "t"), listed("c")])["adapter_id"].to_pylist() == ["a"]
    mine.merge_files(pa.concat_tables([mine.of([listed("a")]), pa.Table.from_pylist([row("b", "t", 7)], schema=KEPT)]))
    assert len(folder.list_files()) == 2
    found = KeptRows(folder).of([listed("a"), listed("b"), listed("b", "t"), listed("c"), listed("d", ""), listed("z")])
    assert [(one["adapter_id"], one["state"]) for one in found.to_pylist()] == [("a", "s"), ("b", "t"), ("c", "s"), ("z", "s")]


def test_a_row_has_the_name_that_its_adapter_has_now_and_of_what_is_not_looked_at_there_is_none(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    KeptRows(folder).blocks.add([row("a", "s", 7)])
    found = KeptRows(folder).of([Listed("deep/a", "/pool/a", None, "s"), Listed("b", "/pool/a", "excluded", "s")])
    assert found["adapter_id"].to_pylist() == ["deep/a"]


def test_sketches_of_two_salts_are_not_compared_and_a_file_that_is_cut_short_is_passed_over(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    KeptRows(folder).blocks.add([row("a", "s", 7)])
    KeptRows(folder).blocks.add([row("b", "s", 8), row("c", "s", 8)])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / folder.list_files()[0]).read_bytes()[:-20])
    kept = KeptRows(folder)
    found = kept.of([listed(name) for name in "abc"])
    assert (kept.salt, found["adapter_id"].to_pylist()) == (8, ["b", "c"])
    kept.merge_files(found)
    assert len(folder.list_files()) == 1


def test_what_was_written_a_moment_ago_may_be_written_again_at_the_same_time(
    tiny_base: str, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    one = make_adapter(tmp_path / "a", tiny_base)
    assert [found.state for found in look_at(str(tmp_path)).found] == [None]
    for file in one.iterdir():
        os.utime(file, (time.time() - 60, time.time() - 60))
    [settled] = look_at(str(tmp_path)).found
    assert settled.state
    os.utime(one / CONFIG_FILE, (time.time() - 59, time.time() - 59))
    assert look_at(str(tmp_path)).found[0].state not in (None, settled.state)
