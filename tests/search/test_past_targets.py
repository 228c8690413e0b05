"""Who enters a race, by what the store knows of past targets. Engines are stood for by a table of losses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from races import copies

from pipeline.adapters.adapter import hash_of
from pipeline.config import Config, SearchConfig, TargetConfig
from pipeline.core.tables import BASE_ID, SCORES
from pipeline.run_folder import Run
from pipeline.search import past_targets, scoring
from pipeline.search.batch import candidates_table
from pipeline.search.engine_pool import Engines
from pipeline.search.past_targets import PREDICTION_FILE, choose_entrants, past_losses, record_outcome
from pipeline.search.race import Schedule
from pipeline.search.score_store import Known

N, TARGETS = 160, 8
NAMES = [f"a{n:03}" for n in range(N)]
ENGINE: Any = None


@pytest.fixture
def run(tiny_base: str, tmp_path: Path) -> Run:
    search = SearchConfig(engine="transformers", dtype="float32", store=str(tmp_path / "store"))
    return Run(
        Config(run=str(tmp_path / "run"), base=tiny_base, pool="pool", target=TargetConfig(train="t.jsonl"), search=search)
    )


@pytest.fixture
def drawn(random_samples: Callable[..., pa.Table]) -> pa.Table:
    return random_samples([12] * 8, n_search=6)


@pytest.fixture
def catalogue() -> pa.Table:
    return candidates_table(NAMES, NAMES, [f"hash-{name}" for name in NAMES])


@pytest.fixture
def truth() -> list[np.ndarray[Any, Any]]:
    """Of each target, the last of them new: losses a token of the base, and of each adapter less that."""
    generator = np.random.default_rng(0)
    skills = generator.standard_normal((N, 3))
    return [skills @ generator.dirichlet(np.ones(3)) for _ in range(TARGETS + 1)]


def fill(run: Run, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], names: list[str] = NAMES, targets: int = TARGETS) -> None:
    """Past targets of four samples each, in the store."""
    store = scoring.store_of(run)
    for target in range(targets):
        rows = [(BASE_ID, f"t{target}-{n}", 20.0, 10, 0) for n in range(4)]
        known = zip(names, truth[target], strict=False)
        rows += [(name, f"t{target}-{n}", 20.0 + 10 * float(loss) + 0.1 * n, 10, 0) for name, loss in known for n in range(4)]
        scores = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCORES)
        store.write(scores, {BASE_ID: BASE_ID, **{name: f"hash-{name}" for name in names}})


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, truth: list[np.ndarray[Any, Any]]) -> list[list[str]]:
    """Who was scored on the new target, race by race."""
    asked: list[list[str]] = []

    def race(run: Run, engines: Any, work: Any, engine: Any, schedule: Any, details: Any) -> tuple[Known, list[int]]:
        names = work.candidates["adapter_id"].to_pylist()
        asked.append(names)
        loss = {BASE_ID: 0.0, **dict(zip(NAMES, truth[-1], strict=True))}
        tokens = np.full(len(work.samples), 10)
        nll = np.array([[10 * (2 + loss[name])] * len(tokens) for name in names])
        return Known(nll, np.zeros_like(nll), tokens), [len(tokens)] * len(names)

    monkeypatch.setattr(past_targets, "race", race)
    return asked


def chosen(run: Run, catalogue: pa.Table, drawn: pa.Table) -> list[str]:
    racing: list[str] = choose_entrants(run, ENGINE, ENGINE, catalogue, drawn, run.folder.sub("failures"), {})[
        "adapter_id"
    ].to_pylist()
    return racing


def test_those_that_may_be_among_the_best_enter_and_a_few_others(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    fill(run, drawn, truth)
    racing = chosen(run, catalogue, drawn)
    best = [NAMES[n] for n in np.argsort(truth[-1])[:3]]
    assert set(best) <= set(racing)
    assert len(racing) < 0.7 * N
    probes = [name for one in probed for name in one if name != BASE_ID]
    assert len(probes) == len(set(probes)) == len(racing) - len(run.folder.read_json(PREDICTION_FILE)["audited"])
    assert len(probed[0]) == 1 + past_targets.FEWEST_PROBES
    told = run.folder.read_json(PREDICTION_FILE)
    assert told["past_samples"] == 4 * TARGETS
    assert sorted([*racing, *told["left_out"]]) == NAMES
    assert set(told["audited"]) <= set(racing)
    assert len(told["audited"]) == math.ceil(past_targets.AUDITED * (len(told["audited"]) + len(told["left_out"])))
    assert told["foretold"].keys() == set(NAMES) - set(probed[0])
    assert told["probes"] == probes


def test_a_search_that_is_taken_up_again_has_the_same_entrants(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    fill(run, drawn, truth)
    first, rounds = chosen(run, catalogue, drawn), len(probed)
    fill(run, drawn, truth[::-1], targets=2)  # another run's scores, meanwhile
    assert chosen(run, catalogue, drawn) == first
    assert len(probed) == rounds
    assert chosen(run, catalogue.slice(1), drawn) != first  # another pool
    assert len(probed) > rounds


def test_probing_that_was_interrupted_ends_as_it_would_have(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    """What the first attempt has scored is in the store, and is not taken for what others had scored before it."""
    fill(run, drawn, truth)
    undisturbed = chosen(run, catalogue, drawn)
    first = [name for name in probed[0] if name != BASE_ID]
    told = run.folder.read_json(PREDICTION_FILE)
    run.folder.write_json(PREDICTION_FILE, {"key": told["key"], "scored_before": []})
    store = scoring.store_of(run)
    loss = {BASE_ID: 0.0, **dict(zip(NAMES, truth[-1], strict=True))}
    rows = [(n, s, 10 * (2 + float(loss[n])), 10, 0) for n in (BASE_ID, *first) for s in drawn["sample_id"].to_pylist()]
    scores = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCORES)
    store.write(scores, {BASE_ID: BASE_ID, **{name: f"hash-{name}" for name in first}})
    assert chosen(run, catalogue, drawn) == undisturbed


@pytest.mark.parametrize("known", ["nothing", "a small pool", "one target too few", "less than half of the pool"])
def test_where_too_little_is_known_everybody_enters(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]], known: str
) -> None:
    if known == "a small pool":
        fill(run, drawn, truth)
        catalogue = catalogue.slice(0, past_targets.MIN_POOL - 1)
    elif known == "one target too few":
        fill(run, drawn, truth, targets=TARGETS - 1)
    elif known == "less than half of the pool":
        fill(run, drawn, truth, names=NAMES[: N // 2 - 1])
    assert chosen(run, catalogue, drawn) == catalogue["adapter_id"].to_pylist()
    assert probed == []
    assert known == "a small pool" or run.folder.read_json(PREDICTION_FILE)["left_out"] == []  # kept for who takes the search up
    fill(run, drawn, truth)
    assert chosen(run, catalogue, drawn) == catalogue["adapter_id"].to_pylist()


def test_adapters_with_little_past_enter(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    fill(run, drawn, truth, names=NAMES[:120])
    fill(run, drawn, truth, targets=3)  # the other forty were in three of eight
    assert set(NAMES[120:]) <= set(chosen(run, catalogue, drawn))


def test_those_that_are_scored_on_the_target_already_enter_and_teach(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    fill(run, drawn, truth)
    worst = [NAMES[n] for n in np.argsort(-truth[-1])[:5]]
    store = scoring.store_of(run)
    rows = [(name, sample, 99.0, 10, 0) for name in worst for sample in drawn["sample_id"].to_pylist()]
    scores = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCORES)
    store.write(scores, {name: f"hash-{name}" for name in worst})
    racing = chosen(run, catalogue, drawn)
    assert set(worst) <= set(racing)
    assert set(worst) <= set(probed[0])
    assert len(racing) < 0.7 * N


@pytest.mark.parametrize("what", ["base", "probes"])
def test_where_nothing_sound_comes_of_the_probes_everybody_enters(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fill(run, drawn, truth)

    def race(run: Run, engines: Any, work: Any, *asked: Any) -> tuple[Known, list[int]]:
        nll = np.full((len(work.candidates), len(work.samples)), 20.0)
        nll[0 if what == "base" else slice(1, None)] = np.inf if what == "base" else np.nan
        return Known(nll, np.zeros_like(nll), np.full(len(work.samples), 10)), [4] * len(nll)

    monkeypatch.setattr(past_targets, "race", race)
    assert chosen(run, catalogue, drawn) == NAMES


def test_a_budget_in_seconds_goes_to_the_race_alone(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    fill(run, drawn, truth)
    budget = run.config.search.budget.model_copy(update={"share": None, "seconds": 60.0})
    run.config = run.config.model_copy(update={"search": run.config.search.model_copy(update={"budget": budget})})
    assert chosen(run, catalogue, drawn) == NAMES
    assert probed == []


def test_adapters_without_a_past_enter(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    fill(run, drawn, truth, names=NAMES[:100])
    assert set(NAMES[100:]) <= set(chosen(run, catalogue, drawn))
    assert not set(probed[0]) & set(NAMES[100:])


def test_a_targets_own_samples_are_no_past(
    run: Run, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], catalogue: pa.Table
) -> None:
    fill(run, drawn, truth)
    store = scoring.store_of(run)
    hashes = catalogue["adapter_hash"].to_pylist()
    own = pa.table({"sample_id": ["t0-0", "t0-1", "t0-2", "t0-3"]})
    assert past_losses(store, hashes, drawn).shape == (N, 4 * TARGETS)
    found = past_losses(store, hashes, own)
    assert found.shape == (N, 4 * TARGETS - 4)
    columns = np.sort(found[:, :], axis=1)
    assert np.allclose(
        columns, np.sort(np.column_stack([truth[t] + 0.01 * n for t in range(1, TARGETS) for n in range(4)]), axis=1)
    )


def test_the_prediction_is_judged_by_the_race(
    run: Run, catalogue: pa.Table, drawn: pa.Table, truth: list[np.ndarray[Any, Any]], probed: list[list[str]]
) -> None:
    fill(run, drawn, truth)
    racing = [BASE_ID, *chosen(run, catalogue, drawn)]
    told = run.folder.read_json(PREDICTION_FILE)
    loss = {BASE_ID: 0.0, **dict(zip(NAMES, truth[-1], strict=True))}
    tokens = np.full(8, 10)
    nll = np.array([[10 * (2 + loss[name])] * 8 for name in racing])
    through = told["audited"][:1]
    seen = [8 if name in (BASE_ID, *through) else 4 for name in racing]
    details = record_outcome(run, racing, Known(nll, np.zeros_like(nll), tokens), seen)
    outcome = run.folder.read_json(PREDICTION_FILE)["outcome"]
    assert outcome["correlation"] > 0.9
    assert outcome["raced"] == len(set(racing) & set(told["foretold"]))
    assert outcome["audited_among_best"] == through
    assert details == {
        "left_out_by_prediction": N + 1 - len(racing),
        "audited": len(told["audited"]),
        "audited_among_best": 1,
        "prediction_correlation": outcome["correlation"],
    }
    assert chosen(run, catalogue, drawn) == racing[1:]  # what was found out changes nothing of it


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_real_engines_learn_of_eight_targets_who_need_not_race_on_the_ninth(
    run: Run, pool: dict[str, Path], random_samples: Callable[..., pa.Table], tmp_path: Path
) -> None:
    """Sixteen near copies of each of four adapters: who is like the best one races."""
    uris = copies(pool, 16, tmp_path / "pool")
    hashes = [hash_of(Path(uri)) for uri in uris.values()]
    catalogue = candidates_table(list(uris), list(uris.values()), hashes).append_column("rank", pa.array([5] * 64))
    catalogue = catalogue.append_column("target_modules", pa.array([["q_proj", "v_proj"]] * 64))
    asked = {"adapters_per_batch": 8, "cpus_per_actor": 1, "actors": 1}
    run.config = run.config.model_copy(update={"search": run.config.search.model_copy(update=asked)})
    engines, failures, everything = Engines(run.config.search), run.folder.sub("failures"), Schedule((4,), None, 1.0)
    with engines.kept():
        engine = scoring.make_engine(run, catalogue, 5)
        for target in range(8):
            few = random_samples([12] * 4, seed=target)
            few = few.set_column(0, "sample_id", pa.array([f"t{target}-{n}" for n in range(4)]))
            work = scoring.make_work(run, catalogue, few, failures)
            scoring.race(run, engines, work, engine, everything, {})
        drawn = random_samples([12] * 8, n_search=6, seed=99)
        racing = choose_entrants(run, engines, engine, catalogue, drawn, failures, {})["adapter_id"].to_pylist()
        work = scoring.make_work(run, catalogue, drawn.slice(0, 4), failures)
        known, _ = scoring.race(run, engines, work, engine, everything, {})
    best = list(uris)[int(np.argmin(known.nll_NS[1:].sum(axis=1)))].partition("-")[0]
    assert {name for name in uris if name.startswith(best)} <= set(racing)
    assert len(racing) < 64
