"""Who need not enter a race, by what the same adapters did on past targets. The rules are those of `prediction.py`.

The score store knows most adapters' losses on the first samples of each past target. Some probes are scored on the first samples
of the new one, and foretell the others' losses; then those that are the likeliest to be among the best, and so on until nobody
else has a chance, where errors that were seen to be larger or heavier-tailed than foretold let more in. All that were scored
enter the race, and with them a share, drawn anew for each target, of the others: no adapter is hidden for ever, and the report
tells how wrong the prediction was. Adapters without a past enter in any case.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.engines.scorer import EngineConfig
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines
from pipeline.search.prediction import NOBODY, Floats, Indices, choose_probes, components, judge_errors, next_probes, predict
from pipeline.search.race import BASE, FIRST_RUNG, Schedule, finalists
from pipeline.search.score_store import Known, ScoreStore
from pipeline.search.scoring import make_work, race, store_of

MIN_POOL = 64
"""Adapters with a past, below which a race is cheap anyway."""

MIN_SAMPLES = 8 * FIRST_RUNG
"""Past samples on which most of the pool was scored: the first rungs of eight targets. With three or four, one of the best three
was lost in up to three sampled searches of ten."""

MOST_SAMPLES = 512
"""Past samples that are looked at: those on which the most adapters were scored."""

PROBE_SHARE, FEWEST_PROBES = 1 / 16, 16
"""Of the adapters with a past that are scored before the next look."""

MOST_MISSING = 0.5
"""Of the past samples; an adapter that lacks more has no past to speak of."""

RISK = 0.1
"""Of a race whose entrants were chosen so: as of `Schedule`."""

AUDITED = 0.02
"""Share of those that seem not to be among the best which race all the same."""

PREDICTION_FILE = "prediction.json"


@dataclass(frozen=True)
class Entrants:
    """Who enters a race: everybody but those `left_out`; among them `probes`, in the order in which they were scored, and the
    `audited`, who seem not to be among the best. Where nothing could be foretold, all lists are empty.
    `foretold`: adapter_id -> loss on the first samples less the base's, in nats a token, the last before it was scored."""

    key: str
    past_samples: int
    probes: list[str]
    left_out: list[str]
    audited: list[str]
    foretold: dict[str, float]


def choose_entrants(
    run: Run,
    engines: Engines,
    engine: EngineConfig,
    catalogue: pa.Table,
    drawn: pa.Table,
    failures: Folder,
    details: dict[str, Any],
) -> pa.Table:
    """The adapters of a catalogue that are to race. A search that is taken up again has those that it had before.

    Args:
        engine: of the race to come, which scores the probes, too.
    """
    search = run.config.search
    # With a budget in seconds the race itself is bound to the clock, and probing is not; losses are what is foretold.
    if len(catalogue) < MIN_POOL or search.budget.seconds or search.rank_by != "nll":
        return catalogue
    key = digest(catalogue["adapter_hash"].to_pylist(), drawn["sample_id"].to_pylist())
    score = partial(_score, run, engines, engine, drawn.slice(0, FIRST_RUNG), failures, details)
    chosen = _kept(run, key) or _choose(run, key, catalogue, drawn, score)
    run.folder.write_json(PREDICTION_FILE, asdict(chosen))
    if not chosen.left_out:
        return catalogue
    run.progress.say(
        f"{len(chosen.left_out)} of {len(catalogue)} adapters do not race: by {chosen.past_samples} samples of past targets and "
        f"the scores of {len(chosen.probes)} adapters on this one they are not among the best"
    )
    out = set(chosen.left_out)
    return catalogue.filter([name not in out for name in catalogue["adapter_id"].to_pylist()])


def record_outcome(run: Run, names: list[str], known: Known, seen: list[int]) -> dict[str, Any]:
    """Add to the prediction how wrong it was: of those that raced and were foretold the correlation of both losses, and who of
    the audited ones went through to the end. Gives a summary, for the stage's details."""
    chosen = run.folder.read_json(PREDICTION_FILE) if run.folder.exists(PREDICTION_FILE) else {}
    if not chosen.get("left_out"):
        return {}
    row_of = {name: row for row, name in enumerate(names)}
    raced = [name for name in chosen["foretold"] if name in row_of and seen[row_of[name]]]
    found = _mean_differences(known, [row_of[name] for name in raced], FIRST_RUNG)
    foretold = np.array([chosen["foretold"][name] for name in raced])
    through = [name for name in chosen["audited"] if name in row_of and seen[row_of[name]] == len(known.tokens_S)]
    both = np.isfinite(found)
    wrong = {
        "raced": len(raced),
        "correlation": round(float(np.corrcoef(found[both], foretold[both])[0, 1]), 3) if both.sum() > 2 else None,
        "root_mean_square_error": round(float(np.sqrt(np.mean((found - foretold)[both] ** 2))), 4) if both.any() else None,
        "audited_among_best": through,
    }
    run.folder.write_json(PREDICTION_FILE, chosen | {"outcome": wrong})
    counts = {"left_out_by_prediction": len(chosen["left_out"]), "audited": len(chosen["audited"])}
    return counts | {"audited_among_best": len(through), "prediction_correlation": wrong["correlation"]}


def _kept(run: Run, key: str) -> Entrants | None:
    if not run.folder.is_complete(PREDICTION_FILE):
        return None
    kept = run.folder.read_json(PREDICTION_FILE)
    kept.pop("outcome", None)
    return Entrants(**kept) if kept["key"] == key and "probes" in kept else None


def _choose(run: Run, key: str, catalogue: pa.Table, drawn: pa.Table, score: Callable[[pa.Table], Floats]) -> Entrants:
    """`score`: gives the losses of the adapters of a table on the first samples, less the base's."""
    store = store_of(run)
    past_NM = past_losses(store, catalogue["adapter_hash"].to_pylist(), drawn)
    names = np.array(catalogue["adapter_id"].to_pylist(), object)
    if past_NM.shape[1] < MIN_SAMPLES:
        return Entrants(key, past_NM.shape[1], [], [], [], {})
    rows = np.flatnonzero(np.isnan(past_NM).mean(axis=1) <= MOST_MISSING)
    if len(rows) < MIN_POOL:
        return Entrants(key, past_NM.shape[1], [], [], [], {})
    adapters, names = catalogue.take(rows), names[rows]
    known = store.load(adapters["adapter_hash"].to_pylist(), drawn.slice(0, FIRST_RUNG))
    scored = _scored_before(run, key, names, np.isfinite(known.nll_NS.sum(axis=1)))
    score_rows = lambda some: score(adapters.take(some))  # noqa: E731
    probes, foretold = probe(components(past_NM[rows]), finalists(len(catalogue)), score_rows, scored)
    unlikely = np.setdiff1d(np.arange(len(rows)), probes)
    generator = np.random.default_rng(int(key, 16) % 2**32)
    audited = np.sort(generator.permutation(unlikely)[: math.ceil(AUDITED * len(unlikely))])
    left_out = np.setdiff1d(unlikely, audited)
    told = {names[row]: round(float(foretold[row]), 4) for row in np.flatnonzero(np.isfinite(foretold))}
    return Entrants(key, past_NM.shape[1], names[probes].tolist(), names[left_out].tolist(), names[audited].tolist(), told)


def _scored_before(run: Run, key: str, names: NDArray[np.object_], known_N: NDArray[np.bool_]) -> Indices:
    """Rows of those that had scores on this target when probing began: a search that was interrupted goes on as it would have."""
    begun = run.folder.read_json(PREDICTION_FILE) if run.folder.is_complete(PREDICTION_FILE) else {}
    if begun.get("key") != key:
        begun = {"key": key, "scored_before": names[known_N].tolist()}
        run.folder.write_json(PREDICTION_FILE, begun)
    return np.flatnonzero(np.isin(names.astype(str), begun["scored_before"]))


def probe(parts_NR: Floats, keep: int, score: Callable[[Indices], Floats], scored: Indices = NOBODY) -> tuple[Indices, Floats]:
    """Score adapters, by their rows, until nobody else may be among the `keep` best. Gives those that were scored, and
    what was foretold of each adapter before it was scored (NaN of the first probes)."""
    count = max(FEWEST_PROBES, round(PROBE_SHARE * len(parts_NR)))
    probes, losses, foretold = NOBODY, np.empty(0), np.full(len(parts_NR), np.nan)
    errors, spread = np.empty(0), np.full(len(parts_NR), np.nan)
    batch = np.append(scored, choose_probes(parts_NR, count, scored))
    while len(batch):
        probes, losses = np.append(probes, batch), np.append(losses, score(batch))
        sound = np.isfinite(losses)
        if sound.sum() < FEWEST_PROBES / 2:  # the base's own loss may be no number, or the pool be gone: the race says so
            return np.arange(len(parts_NR)), foretold
        error = (losses[-len(batch) :] - foretold[batch]) / spread[batch]
        errors = np.append(errors, error[np.isfinite(error)])
        prediction = predict(parts_NR, probes[sound], losses[sound])
        batch = next_probes(prediction, probes, losses[sound], keep, count, judge_errors(errors))
        others = np.setdiff1d(np.arange(len(parts_NR)), probes)
        foretold[others], spread[others] = prediction.mean_N[others], prediction.std_N[others]
    return probes, foretold


def _score(
    run: Run,
    engines: Engines,
    engine: EngineConfig,
    first: pa.Table,
    failures: Folder,
    details: dict[str, Any],
    adapters: pa.Table,
) -> Floats:
    """Mean losses of some adapters on the first samples, less the base's; NaN or infinite where they cannot be scored."""
    work = make_work(run, adapters, first, failures)
    known, _ = race(run, engines, work, engine, Schedule((len(first),), None, 1.0), details)
    return _mean_differences(known, list(range(1, len(adapters) + 1)), len(first))


def past_losses(store: ScoreStore, hashes: list[str], own: pa.Table) -> Floats:
    """Losses of N adapters on M past samples less the base's, in nats a token, shape (N, M): on those samples that half of them
    were scored on, apart from a target's own; NaN where one was not."""
    losses = store.losses_by_sample([*hashes, BASE_ID], 1 + len(hashes) // 2, MOST_SAMPLES, own["sample_id"].to_pylist())
    past_NM: Floats = losses[:-1] - losses[-1]
    return past_NM[:, ~np.isnan(losses[-1])]


def _mean_differences(known: Known, rows: list[int], end: int) -> Floats:
    """Mean NLL a token over the first samples, less the base's."""
    means: Floats = known.nll_NS[:, :end].sum(axis=1) / known.tokens_S[:end].sum()
    return means[rows] - means[BASE]
