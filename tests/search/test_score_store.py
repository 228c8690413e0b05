"""The score store: what was scored is known by content, whoever wrote it, under whatever name."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.core.storage import Folder
from pipeline.core.tables import SCORES, STORED
from pipeline.search.leaderboard import score_table
from pipeline.search.score_store import MANY_FILES, Known, News, ScoreStore, forget_failures, read_failures, record_failures

Draw = Callable[..., pa.Table]
SAMPLE_IDS = [f"s{n}" for n in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    return ScoreStore.at(str(tmp_path), "base", "vllm", "float32")


@pytest.fixture(scope="module")
def samples() -> pa.Table:
    """The samples' completions have 3 + place % 5 tokens, as `drawn_scores` has it."""
    masks = [[False, *[True] * (3 + place % 5)] for place in range(6)]
    return pa.table({"sample_id": SAMPLE_IDS, "completion_mask": masks})


def by_name(scores: pa.Table) -> dict[str, str]:
    return {name: f"hash-{name}" for name in scores["adapter_id"].unique().to_pylist()}


def test_before_the_first_file_nothing_is_known(store: ScoreStore, samples: pa.Table) -> None:
    known = store.load(["hash-a", "hash-b"], samples)
    assert known.nll_NS.shape == (2, 6)
    assert np.isnan(known.nll_NS).all()
    assert known.tokens_S.tolist() == [3, 4, 5, 6, 7, 3]


def test_scores_are_known_by_content_in_the_order_that_is_asked_for(
    store: ScoreStore, samples: pa.Table, drawn_scores: Draw
) -> None:
    table = drawn_scores(["a", "b"], SAMPLE_IDS)
    store.write(table, by_name(table))
    reverse = samples.take(list(range(6))[::-1])
    known = store.load(["hash-b", "hash-unknown", "hash-a"], reverse)
    for place, name in ((0, "b"), (2, "a")):
        rows = [row for row in table.to_pylist() if row["adapter_id"] == name][::-1]
        assert known.nll_NS[place].tolist() == [row["nll_sum"] for row in rows]
        assert known.hits_NS[place].tolist() == [row["n_correct"] for row in rows]
    assert np.isnan(known.nll_NS[1]).all()


def test_first_choices_that_an_engine_does_not_tell_are_not_known(
    store: ScoreStore, samples: pa.Table, drawn_scores: Draw, tmp_path: Path
) -> None:
    table = drawn_scores(["a"], SAMPLE_IDS)
    untold = pa.array([None, *table["n_correct"].to_pylist()[1:]], pa.int32())
    store.write(table.set_column(table.column_names.index("n_correct"), "n_correct", untold), by_name(table))
    known = store.load(["hash-a"], samples)
    assert np.isnan(known.hits_NS[0]).tolist() == [True, *[False] * 5]
    assert score_table(["a"], known, SAMPLE_IDS)["n_correct"].to_pylist() == untold.to_pylist()


def test_a_file_that_is_cut_short_is_passed_over(
    store: ScoreStore, samples: pa.Table, drawn_scores: Draw, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        table = drawn_scores([name], SAMPLE_IDS)
        store.write(table, by_name(table))
    broken = next(tmp_path.rglob("*.parquet"))
    kept = pq.read_table(next(file for file in tmp_path.rglob("*.parquet") if file != broken))["adapter_hash"][0].as_py()
    broken.write_bytes(broken.read_bytes()[:-20])
    known = store.load(["hash-a", "hash-b"], samples)
    assert np.isnan(known.nll_NS).all(axis=1).tolist() == [kept != "hash-a", kept != "hash-b"]
    assert store.mean_losses(samples)["adapter_hash"].to_pylist() == [kept]


def test_news_are_what_others_add_while_a_race_goes_on(
    store: ScoreStore, samples: pa.Table, drawn_scores: Draw, tmp_path: Path
) -> None:
    def write(name: str, ids: list[str]) -> str:
        table = drawn_scores([name], ids)
        return store.write(table, by_name(table))

    def pairs(table: pa.Table) -> list[tuple[str, str]]:
        return sorted(zip(table["adapter_hash"].to_pylist(), table["sample_id"].to_pylist(), strict=True))

    write("old", SAMPLE_IDS)
    news, two = News(store, samples.slice(0, 4)), SAMPLE_IDS[:2]
    assert len(news.take([])) == 0
    write("other", SAMPLE_IDS)
    own = write("own", SAMPLE_IDS)
    (tmp_path / "v3-base-vllm-float32" / "cut.parquet").write_bytes(b"PAR1")
    found = news.take([own])
    assert pairs(found) == [("hash-other", sample) for sample in SAMPLE_IDS[:4]]  # those of the race
    assert found.schema == STORED
    write("half", two)
    assert pairs(news.take([own])) == [("hash-half", sample) for sample in two]
    assert len(news.take([own])) == 0


def test_another_base_engine_or_type_knows_nothing_of_it(tmp_path: Path, samples: pa.Table, drawn_scores: Draw) -> None:
    table = drawn_scores(["a"], SAMPLE_IDS)
    ScoreStore.at(str(tmp_path), "base", "vllm", "float32").write(table, by_name(table))
    for other in (("base2", "vllm", "float32"), ("base", "transformers", "float32"), ("base", "vllm", "bfloat16")):
        assert np.isnan(ScoreStore.at(str(tmp_path), *other).load(["hash-a"], samples).nll_NS).all()


def test_a_part_of_the_samples_may_be_known(store: ScoreStore, samples: pa.Table, drawn_scores: Draw) -> None:
    table = drawn_scores(["a"], SAMPLE_IDS[:4])
    store.write(table, by_name(table))
    assert np.isnan(store.load(["hash-a"], samples).nll_NS[0]).tolist() == [False] * 4 + [True] * 2


def test_a_loss_that_is_no_number_is_known_as_the_worst(store: ScoreStore, samples: pa.Table, drawn_scores: Draw) -> None:
    table = drawn_scores(["a"], SAMPLE_IDS)
    store.write(table.set_column(2, SCORES.field("nll_sum"), pa.array([float("nan")] * 6)), {"a": "hash-a"})
    assert np.isposinf(store.load(["hash-a"], samples).nll_NS).all()


def test_many_writers_at_once_and_the_merging_of_their_files_lose_nothing(
    store: ScoreStore, samples: pa.Table, drawn_scores: Draw
) -> None:
    """Some pairs are written twice, as by two runs at the same time."""
    names = [f"a{n}" for n in range(MANY_FILES)]

    def write(name: str) -> None:
        table = drawn_scores([name], SAMPLE_IDS, int(name[1:]))
        store.write(table, by_name(table))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [*names, *names[:10]]))
    hashes = [f"hash-{name}" for name in names]
    before = store.load(hashes, samples)
    assert not np.isnan(before.nll_NS).any()
    mergers = 4
    with ThreadPoolExecutor(mergers) as pool:
        for merging in [pool.submit(store.merge_files) for _ in range(mergers)]:
            merging.result()
    assert len(store.folder.list_files(".parquet")) <= mergers
    after = store.load(hashes, samples)
    assert after.nll_NS.tolist() == before.nll_NS.tolist()
    assert after.hits_NS.tolist() == before.hits_NS.tolist()
    store.merge_files()
    assert store.folder.read_table(store.folder.list_files(".parquet")[0]).schema == STORED


def test_mean_losses_are_of_the_wanted_samples_alone(store: ScoreStore, samples: pa.Table, drawn_scores: Draw) -> None:
    assert len(store.mean_losses(samples)) == 0
    for place, name in enumerate("ab"):
        table = drawn_scores([name], [*SAMPLE_IDS, "another"], place)
        store.write(table, by_name(table))
        wanted = table.filter(pc.not_equal(table["sample_id"], "another"))
        found = {row["adapter_hash"]: row["known_nll"] for row in store.mean_losses(samples).to_pylist()}
        mean = sum(wanted["nll_sum"].to_pylist()) / sum(wanted["n_tokens"].to_pylist())
        assert found[f"hash-{name}"] == pytest.approx(mean)


def test_in_an_object_store(bucket: str, samples: pa.Table, drawn_scores: Draw) -> None:
    store = ScoreStore.at(f"{bucket}/scores", "base", "vllm", "float32")
    table = drawn_scores(["a"], SAMPLE_IDS)
    store.write(table, by_name(table))
    assert not np.isnan(store.load(["hash-a"], samples).nll_NS).any()


def test_failures_are_kept_by_name(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "failures")
    record_failures(folder, {})
    assert not folder.exists()
    record_failures(folder, {"a": "corrupt"})
    record_failures(folder, {"b": "gone"})
    assert read_failures(folder) == {"a": "corrupt", "b": "gone"}
    forget_failures(folder, "gone")
    forget_failures(folder, "nobody's reason")
    assert read_failures(folder) == {"a": "corrupt"}


def test_a_race_by_token_accuracy_adds_up_the_tokens_that_were_missed() -> None:
    nll_NS, hits_NS = np.array([[1.0, np.inf, np.nan], [2.0, 3.0, 1.0]]), np.array([[2.0, 0.0, np.nan], [1.0, np.nan, 3.0]])
    known = Known(nll_NS, hits_NS, np.array([2, 3, 4], np.int32))
    assert known.ranked_by("nll") is nll_NS
    assert np.array_equal(known.ranked_by("token_accuracy"), [[0, np.inf, np.nan], [1, np.nan, 1]], equal_nan=True)
