"""The reducer of the search: scores -> leaderboard, file by file, so that memory holds one file at a time."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.metrics import mean_per_token
from pipeline.search.store import ScoreFiles, aligned
from pipeline.tables import BASE_ID, LEADERBOARD


def build_leaderboard(files: ScoreFiles, samples: pa.Table) -> pa.Table:
    """Rank every scored adapter and the base by their NLL on the search split, the lowest first.

    Differences to the base are paired: both saw the same samples.

    Raises:
        ValueError: the base has no scores.
    """
    search, holdout = (_ids(samples, split) for split in ("search", "holdout"))
    try:
        base = files.of_adapter(BASE_ID, search + holdout)
    except KeyError as error:
        raise ValueError(f"{files.folder.uri}: the base model has no score on sample {error}; run the search again") from error
    rows: dict[str, dict[str, Any]] = {}
    for fragment in files.scores().get_fragments():
        for adapter_id, scores in _by_adapter(fragment.to_table()):
            if len(scores) >= len(samples):
                rows[adapter_id] = _row(adapter_id, aligned(scores, search + holdout), base, len(search))
    # NaN compares with nothing and would leave the rest unsorted.
    ranked = sorted(rows.values(), key=lambda row: (math.isnan(row["nll"]), row["nll"], row["adapter_id"]))
    return pa.Table.from_pylist([{"place": place, **row} for place, row in enumerate(ranked, start=1)], schema=LEADERBOARD)


def paired_difference(scores: dict[str, np.ndarray], base: dict[str, np.ndarray], rows: slice) -> tuple[float, float]:
    """Mean NLL per token minus the base's, over the samples `rows`, with the standard error of the paired difference."""
    estimate = mean_per_token((scores["nll_sum"] - base["nll_sum"])[rows], base["n_tokens"][rows])
    return estimate.mean, estimate.stderr


def _row(adapter_id: str, scores: dict[str, np.ndarray], base: dict[str, np.ndarray], n_search: int) -> dict[str, Any]:
    search, holdout = slice(0, n_search), slice(n_search, None)
    nll = mean_per_token(scores["nll_sum"][search], scores["n_tokens"][search])
    difference, stderr = paired_difference(scores, base, search)
    return {
        "adapter_id": adapter_id,
        "nll": nll.mean,
        "stderr": nll.stderr,
        "n_samples": n_search,
        "nll_minus_base": difference,
        "nll_minus_base_stderr": stderr,
        "token_accuracy": float(scores["n_correct"][search].sum() / scores["n_tokens"][search].sum()),
        "holdout_nll_minus_base": paired_difference(scores, base, holdout)[0],
    }


def _ids(samples: pa.Table, split: str) -> list[str]:
    return samples.filter(pc.equal(samples["split"], split))["sample_id"].to_pylist()


def _by_adapter(scores: pa.Table) -> list[tuple[str, pa.Table]]:
    return [(name, scores.filter(pc.equal(scores["adapter_id"], name))) for name in scores["adapter_id"].unique().to_pylist()]
