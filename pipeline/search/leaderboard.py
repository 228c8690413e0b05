"""The reducer of the search: known scores -> leaderboard. Pure functions; no Ray here."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.stats import mean_per_token
from pipeline.core.tables import LEADERBOARD, SCORES
from pipeline.search.race import BASE
from pipeline.search.score_store import Known

Values = NDArray[np.float64]


def unsound(names: Sequence[str], known: Known, seen: Sequence[int]) -> dict[str, str]:
    """adapter_id -> reason, of the candidates that gave NaN or Inf for one of the samples that count for them.

    Raises:
        ValueError: the base did.
    """
    counts = {
        name: (int(np.isinf(known.nll_NS[candidate, :end]).sum()), end)
        for candidate, (name, end) in enumerate(zip(names, seen, strict=True))
    }
    if counts[names[BASE]][0]:
        raise ValueError(
            "the base model's own loss is NaN or Inf; set search.dtype to float32 or bfloat16, and look at its weights"
        )
    return {name: f"NaN or Inf: its loss on {bad} of {end} samples is no number" for name, (bad, end) in counts.items() if bad}


def build_leaderboard(names: Sequence[str], known: Known, seen: Sequence[int], n_search: int, rank_by: str = "nll") -> pa.Table:
    """Rank the base and every adapter that was scored soundly: who went further in the race first, then the lowest NLL, or as
    `search.rank_by` has it the highest token accuracy, and of equal ones the lowest NLL.

    An adapter's figures are of the samples that it was judged on, and its difference to the base is of the same ones.

    Args:
        names: adapter_id of each candidate, the base first.
        seen: samples that count for each candidate; 0: it was not scored.
        n_search: samples of the search split; those of the hold-out split follow.

    Raises:
        ValueError: the base has no scores.
    """
    if seen[BASE] < len(known.tokens_S):
        raise ValueError("the base model was not scored on every sample; run the search again")
    aside = unsound(names, known, seen)
    judged = enumerate(zip(names, seen, strict=True))
    rows = [_row(name, known, candidate, end, n_search) for candidate, (name, end) in judged if end and name not in aside]
    first = {"nll": lambda row: 0.0, "token_accuracy": lambda row: -(row["token_accuracy"] or 0.0)}[rank_by]
    ranked = sorted(rows, key=lambda row: (-row["n_samples"], first(row), row["nll"], row["adapter_id"]))
    return pa.Table.from_pylist([{"place": place, **row} for place, row in enumerate(ranked, start=1)], schema=LEADERBOARD)


def score_table(names: Sequence[str], known: Known, sample_ids: Sequence[str]) -> pa.Table:
    """What is known, as rows of schema SCORES."""
    candidates, samples = np.nonzero(~np.isnan(known.nll_NS))
    columns = [
        pa.array(names, pa.string()).take(candidates),
        pa.array(sample_ids, pa.string()).take(samples),
        known.nll_NS[candidates, samples],
        known.tokens_S[samples],
        pa.array(known.hits_NS[candidates, samples], from_pandas=True).cast(pa.int32()),
    ]
    return pa.table(columns, schema=SCORES)


def paired_difference(nll_S: Values, base_S: Values, tokens_S: Values) -> tuple[float, float]:
    """Mean NLL per token minus the base's over the same samples, with the standard error of the paired difference."""
    estimate = mean_per_token(nll_S - base_S, tokens_S)
    return estimate.mean, estimate.stderr


def _row(name: str, known: Known, candidate: int, end: int, n_search: int) -> dict[str, Any]:
    nll_S, base_S, tokens_S = known.nll_NS[candidate], known.nll_NS[BASE], known.tokens_S.astype(np.float64)
    search, holdout = slice(0, min(end, n_search)), slice(n_search, None)
    nll = mean_per_token(nll_S[search], tokens_S[search])
    difference, stderr = paired_difference(nll_S[search], base_S[search], tokens_S[search])
    hits, finished = known.hits_NS[candidate, search].sum(), end == len(tokens_S)
    return {
        "adapter_id": name,
        "nll": nll.mean,
        "stderr": nll.stderr,
        "n_samples": min(end, n_search),
        "stopped_after": None if finished else end,
        "nll_minus_base": difference,
        "nll_minus_base_stderr": stderr,
        "token_accuracy": None if np.isnan(hits) else float(hits / tokens_S[search].sum()),
        "holdout_nll_minus_base": paired_difference(nll_S[holdout], base_S[holdout], tokens_S[holdout])[0] if finished else None,
    }
