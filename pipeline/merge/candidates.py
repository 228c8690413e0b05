"""What training may start from: merges of donors and their losses, controls, and the arms that train from each."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipeline.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, alpha_at, read_adapter
from pipeline.adapters.fetch import fetch_adapter
from pipeline.adapters.pool import valid_adapters
from pipeline.cluster.resources import compute_task, worker_resources
from pipeline.config import ON_SAMPLES, Config
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.stats import mean_per_token
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.data.splits import split_of
from pipeline.engines.scorer import too_large
from pipeline.merge.build import Built, build, build_on_device, store
from pipeline.merge.learned_weights import greedy_donors, learn_weights
from pipeline.merge.recipes import DENSE, Recipe, random_like
from pipeline.merge.selection import Scored, control_recipes, of_fewer, trained_rank
from pipeline.model.base_model import fingerprint, linear_shapes
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines
from pipeline.search.leaderboard import paired_difference, unsound
from pipeline.search.scoring import CANDIDATE, race_holdout
from pipeline.train.arm import Arm, Job, Lora, row_ids
from pipeline.train.probe import probe, write_probe_data


def score_recipes(
    run: Run, engines: Engines, recipes: list[Recipe], catalogue: pa.Table, details: dict[str, Any]
) -> tuple[list[Scored], float | None]:
    """Merge each recipe, score it on the hold-out samples, and give these losses and the base's."""
    if not recipes:
        return [], None
    recipes = [
        _found_on_samples(run, engines, recipe, catalogue) if recipe.weighting in ON_SAMPLES else recipe for recipe in recipes
    ]
    built = _build(run, engines, recipes, catalogue)
    uris = [run.folder.sub("candidates", name).uri for name in built]
    adapters = pa.table([list(built), uris, [one.hash for one in built.values()]], names=CANDIDATE)
    max_rank = max(recipe.rank for recipe in recipes if recipe.name in built)
    known, seen = race_holdout(run, engines, adapters, catalogue, max_rank, details)
    for name, reason in unsound([BASE_ID, *built], known, seen).items():
        run.progress.say(f"refused: {name}: {reason}")
    tokens, base = known.tokens_S.astype(float), known.nll_NS[0]
    sound = [
        (recipe, nll)
        for recipe, nll, end in zip([r for r in recipes if r.name in built], known.nll_NS[1:], seen[1:], strict=True)
        if end and np.isfinite(nll).all()
    ]
    best = min((nll for _, nll in sound), key=np.sum, default=base)
    scored = [
        Scored(
            recipe,
            mean_per_token(nll, tokens).mean,
            *paired_difference(nll, base, tokens),
            built[recipe.name].kept,
            *paired_difference(nll, best, tokens),
        )
        for recipe, nll in sound
    ]
    return scored, mean_per_token(base, tokens).mean


def _found_on_samples(run: Run, engines: Engines, recipe: Recipe, catalogue: pa.Table) -> Recipe:
    """The recipe with donors or weights that are found on the search sample, once."""
    candidates, file = run.folder.sub("candidates"), f"{recipe.name}.json"
    greedy = recipe.weighting == "greedy"
    if not candidates.is_whole(file):
        search = split_of(run.folder.read_table("samples.parquet"), "search")
        places = _uris(catalogue)
        uris = [places[donor] for donor in recipe.donors]
        run.progress.say(f"{recipe.name}: running {len(uris)} donors together on {len(search)} samples, again and again")
        held = engines.leave_room()
        if greedy:
            task = compute_task(greedy_donors, on_held_cpus=held).remote(run.config.base, uris, search)
        else:
            by_module = recipe.weighting == "learned_by_module"
            task = compute_task(learn_weights, on_held_cpus=held).remote(run.config.base, uris, search, by_module)
        candidates.write_json(file, {"found": ray.get(task)})
    found = candidates.read_json(file)["found"]
    if greedy:
        return of_fewer(recipe, found, catalogue, run.config.merge)
    weights, by_module = found
    module_weights = by_module and {module: tuple(row) for module, row in by_module.items()}
    return replace(recipe, weights=tuple(weights), module_weights=module_weights)


def probe_starts(run: Run, engines: Engines, short_list: list[Scored]) -> dict[str, float | None]:
    """Hold-out losses after a few finetuning steps from the base and from each of a short list, if that is asked for."""
    config = run.config
    if not (config.merge.probe and short_list):
        return {}
    data = run.folder.sub("candidates", "probe", "data")
    write_probe_data(run.folder.sub("data"), split_of(run.folder.read_table("samples.parquet"), "holdout"), data)
    train = config.train.model_copy(update={"evaluations": 1})
    last = min(config.merge.probe, train.steps)
    engines.close()  # whose place the probe needs
    folded = not _trained_on(config, "mashup")
    best = run.folder.sub("candidates", short_list[0].recipe.name)
    shape = _usual_shape(run) if folded else _shape_at(best)  # the base's, too: a larger rank alone learns faster
    lr, seed = config.train.learning_rates[0], config.train.seeds[0]
    jobs = {
        name: Job(Arm(name, lr, seed), config.base, shape, train, data, run.folder.sub("candidates", name), "probe", folded, last)
        for name in (BASE_ID, *(one.recipe.name for one in short_list))
    }
    return probe(jobs, run.folder.sub("candidates", "probe"), run.progress.say)


def _build(run: Run, engines: Engines, recipes: list[Recipe], catalogue: pa.Table) -> dict[str, Built]:
    """Merge each recipe into `candidates/<name>`, and give those that could be merged.

    Raises:
        InputError: the method asked for can merge none of them.
    """
    named = {recipe.name: recipe for recipe in recipes}
    over = {name: reason for name, one in named.items() if (reason := too_large(run.config.search.engine, one.rank))}
    fitting = {name: recipe for name, recipe in named.items() if name not in over}
    built, refused = _merged(run, engines, fitting, _uris(catalogue))
    for name, reason in (over | refused).items():
        run.progress.say(f"refused: {name}: {reason}")
    if not built:
        raise InputError(f"no recipe can be merged: {next(iter((over | refused).values()))}")
    return built


def _merged(
    run: Run, engines: Engines, recipes: dict[str, Recipe], uris: dict[str, str]
) -> tuple[dict[str, Built], dict[str, str]]:
    """As `build`: on a GPU where the cluster has one. For factored merges, which take a CPU seconds, engines that wait for the
    hold-out race with the GPUs in their hands are not ended; for dense ones they are."""
    given = recipes, uris, run.config.base, run.folder.sub("candidates")
    dense = any(recipe.method in DENSE for recipe in recipes.values())
    if not worker_resources("auto", "auto").gpus or (engines.up and not dense):
        return build(*given)
    held = engines.leave_room()
    made: tuple[dict[str, Built], dict[str, str]] = ray.get(compute_task(build_on_device, on_held_cpus=held).remote(*given))
    return made


def make_controls(run: Run, n_donors: int) -> list[str]:
    """Make the control starts that are asked for, in `starts/`. Gives those that there are."""
    asked = [init for init in run.config.compare.inits if init not in ("base", "mashup")]
    if not asked:
        return []
    starts, modules = run.folder.sub("starts"), list(_trained_shape(run).target_modules)
    refused = _write_controls(run, [init for init in asked if not starts.is_whole(init)], starts, n_donors)
    for init in asked:
        if init in refused or not _trained_on(run.config, init):
            continue
        if sorted(starts.read_json(f"{init}/{CONFIG_FILE}")["target_modules"]) != modules:
            refused[init] = "its donors adapt other modules than the arms"
    for name, reason in refused.items():
        run.progress.say(f"start {name} is left out: {reason}")
    return [init for init in asked if init not in refused]


def _write_controls(run: Run, inits: list[str], starts: Folder, n_donors: int) -> dict[str, str]:
    """Write control starts; gives the reasons of those that cannot be made."""
    base = run.config.base
    catalogue = valid_adapters(run.folder.read_table("catalogue.parquet"))
    leaderboard = run.folder.read_table("leaderboard.parquet")
    refused: dict[str, str] = {}
    for init in inits:
        shape = _trained_shape(run) if _trained_on(run.config, init) else _start_shape(run)
        recipes = control_recipes(leaderboard, catalogue, n_donors, shape.rank)
        made = {init: recipes[init]} if init in recipes else {}
        refused |= build(made, _uris(catalogue), base, starts, shape.alpha)[1]
    if "random_delta" in inits and not n_donors:
        refused["random_delta"] = "there is no mashup whose norm it could have"
    elif "random_delta" in inits:
        with tempfile.TemporaryDirectory() as cache:
            mashup = read_adapter(fetch_adapter(run.folder.sub("mashup").uri, Path(cache)))
        store(random_like(mashup, base, linear_shapes(base)[0]), starts, "random_delta")
    return refused


def list_arms(config: Config, starts: list[str]) -> list[Arm]:
    inits = [init for init in config.compare.inits if init in starts] or ["base"]
    return [Arm(init, lr, seed) for init in inits for lr in config.train.learning_rates for seed in config.train.seeds]


def make_jobs(run: Run, arms: Sequence[Arm]) -> list[Job]:
    """The arms with all that training them depends on. Equal weights to start from make equal jobs, whatever led to them."""
    config, lora = run.config, _trained_shape(run)
    rows, budget = _rows(run), _budget(config)
    starts = {
        init: run.folder.sub("mashup") if init == "mashup" else run.folder.sub("starts", init)
        for init in {arm.init for arm in arms}
    }
    keys = {
        init: digest(rows, budget, lora.rank, lora.alpha, lora.target_modules, _weights(start)) for init, start in starts.items()
    }
    return [
        Job(
            arm,
            config.base,
            lora,
            config.train,
            run.folder.sub("data"),
            starts[arm.init],
            keys[arm.init][:8],
            not _trained_on(config, arm.init),
        )
        for arm in arms
    ]


def _rows(run: Run) -> str:
    """Digest of the rows that arms train on and are chosen by, wherever they were read from."""
    data = run.folder.sub("data")
    return digest(fingerprint(run.config.base), [row_ids(data, split) for split in ("train", "validation")])


def probed_training(config: Config) -> dict[str, Any] | None:
    """What a probe depends on of the training that is asked for; None: there is no probe."""
    train = config.train
    return _budget(config) | {"lr": train.learning_rates[0], "seed": train.seeds[0]} if config.merge.probe else None


def _budget(config: Config) -> dict[str, Any]:
    """What is asked of every arm alike."""
    return config.train.model_dump(exclude={"learning_rates", "seeds"})


def _weights(start: Folder) -> list[Any] | None:
    """What tells an adapter's delta weights and its shape; None where there is none. Lists in its config come in any order."""
    if not start.exists(CONFIG_FILE):
        return None
    lora = _shape_at(start)
    return [hashlib.sha256(start.read_bytes(WEIGHTS_FILE)).hexdigest(), lora.rank, lora.alpha, lora.target_modules]


def _trained_on(config: Config, init: str) -> bool:
    """Whether the adapter of a start is itself trained on, rather than folded into the base. The paper always trains on."""
    return config.train.method != "full" and (config.merge.method != "fold" or init == "paper")


def _trained_shape(run: Run) -> Lora:
    """The shape of the adapters that the arms train, where they do."""
    return _start_shape(run) if _trained_on(run.config, "mashup") else _usual_shape(run)


def _start_shape(run: Run) -> Lora:
    """The mashup's shape, or without one the usual one."""
    return _shape_at(run.folder.sub("mashup")) if run.folder.exists("mashup") else _usual_shape(run)


def _shape_at(adapter: Folder) -> Lora:
    content = adapter.read_json(CONFIG_FILE)
    return Lora(content["r"], float(content["lora_alpha"]), tuple(sorted(content["target_modules"])))


def _usual_shape(run: Run) -> Lora:
    """What is trained where no mashup has a shape: modules of most donors, and what learns as fast as they do."""
    rows = valid_adapters(run.folder.read_table("catalogue.parquet")).to_pylist()
    shapes = Counter((row["rank"], row["alpha"], tuple(row["target_modules"])) for row in rows)
    rank, alpha, modules = shapes.most_common(1)[0][0]
    trained = trained_rank(rank, run.config.merge.rank)
    return Lora(trained, alpha_at(trained, rank, alpha / rank), modules)


def _uris(catalogue: pa.Table) -> dict[str, str]:
    return dict(zip(catalogue["adapter_id"].to_pylist(), catalogue["uri"].to_pylist(), strict=True))
