"""The score files: what is known, what is missing, and alignment to the order of the samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.search.store import ScoreFiles, aligned
from pipeline.storage import Folder
from pipeline.tables import SCORES

Draw = Callable[..., pa.Table]
SAMPLE_IDS = [f"s{n}" for n in range(6)]


@pytest.fixture
def files(tmp_path: Path) -> ScoreFiles:
    return ScoreFiles(Folder.at(tmp_path / "scores"))


def adapters(*names: str) -> pa.Table:
    return pa.table({"adapter_id": list(names), "uri": [f"/pool/{name}" for name in names]})


def test_before_the_first_file_everything_is_missing(files: ScoreFiles) -> None:
    assert files.missing(adapters("base", "a"), 6).equals(adapters("base", "a"))
    assert files.scores().to_table().schema == SCORES
    assert files.failures() == {}


def test_only_full_sets_and_failures_are_done(files: ScoreFiles, drawn_scores: Draw) -> None:
    files.write(drawn_scores(["a", "b"], SAMPLE_IDS), {})
    files.write(drawn_scores(["c"], SAMPLE_IDS[:5]), {"d": "cannot be read"})
    assert files.missing(adapters("a", "c", "d", "e"), 6).equals(adapters("c", "e"))
    assert files.failures() == {"d": "cannot be read"}
    assert len(files.scores().to_table()) == 17


def test_more_samples_than_were_scored_are_missing_again(files: ScoreFiles, drawn_scores: Draw) -> None:
    files.write(drawn_scores(["a"], SAMPLE_IDS), {})
    assert len(files.missing(adapters("a"), 6)) == 0
    assert len(files.missing(adapters("a"), 7)) == 1


def test_an_empty_batch_leaves_no_file(files: ScoreFiles) -> None:
    files.write(SCORES.empty_table(), {})
    assert not files.folder.exists()


def test_scores_come_in_the_order_of_the_samples(files: ScoreFiles, drawn_scores: Draw) -> None:
    table = drawn_scores(["a", "b"], SAMPLE_IDS)
    files.write(table, {})
    order = SAMPLE_IDS[::-1]
    found = files.of_adapter("b", order)
    rows = {row["sample_id"]: row for row in table.to_pylist() if row["adapter_id"] == "b"}
    for name in ("nll_sum", "n_tokens", "n_correct"):
        np.testing.assert_array_equal(found[name], [rows[sample][name] for sample in order])


def test_a_sample_without_a_score_is_a_key_error(drawn_scores: Draw) -> None:
    with pytest.raises(KeyError, match="s9"):
        aligned(drawn_scores(["a"], SAMPLE_IDS), ["s0", "s9"])
