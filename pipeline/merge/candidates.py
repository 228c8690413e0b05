"""Recipes -> merges that may be the mashup, with their losses on the hold-out samples, or after a few finetuning steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipeline.adapters.adapter import Indexed
from pipeline.adapters.catalogue import indexed_by_id
from pipeline.cluster.resources import compute_task, worker_resources
from pipeline.config import METHODS, ON_SAMPLES
from pipeline.core.errors import InputError
from pipeline.core.stats import mean_per_token
from pipeline.core.tables import BASE_ID
from pipeline.data.splits import split_of
from pipeline.engines.scorer import too_large
from pipeline.merge.build import Built, build, build_on_device
from pipeline.merge.learned_weights import greedy_donors, learn_weights
from pipeline.merge.recipes import Recipe
from pipeline.merge.selection import Scored, of_fewer
from pipeline.run_folder import Run
from pipeline.search.batch import candidates_table
from pipeline.search.engine_pool import Engines
from pipeline.search.leaderboard import paired_difference, unsound
from pipeline.search.scoring import score_on_holdout
from pipeline.train.arm import Arm, Job
from pipeline.train.probe import probe, write_probe_data
from pipeline.train.starts import is_trained_on, shape_at, usual_shape


def score_recipes(
    run: Run, engines: Engines, recipes: list[Recipe], catalogue: pa.Table, drawn: pa.Table, details: dict[str, Any]
) -> tuple[list[Scored], float | None]:
    """Merge each recipe, score it on the hold-out samples, and give these losses and the base's.

    Args:
        catalogue: the valid adapters.
        drawn: the sample of the target.
    """
    if not recipes:
        return [], None
    sample = split_of(drawn, "search")
    recipes = [
        _found_on_samples(run, engines, recipe, catalogue, sample) if recipe.weighting in ON_SAMPLES else recipe
        for recipe in recipes
    ]
    built = _build(run, engines, recipes, catalogue)
    uris = [run.folder.sub("candidates", name).uri for name in built]
    adapters = candidates_table(list(built), uris, [one.hash for one in built.values()])
    max_rank = max(recipe.rank for recipe in recipes if recipe.name in built)
    known, seen = score_on_holdout(run, engines, adapters, catalogue, drawn, max_rank, details)
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


def _found_on_samples(run: Run, engines: Engines, recipe: Recipe, catalogue: pa.Table, search: pa.Table) -> Recipe:
    """The recipe with donors or weights that are found on the search sample, once."""
    candidates, file = run.folder.sub("candidates"), f"{recipe.name}.json"
    greedy = recipe.weighting == "greedy"
    if not candidates.is_complete(file):
        known = indexed_by_id(catalogue)
        donors = [known[donor] for donor in recipe.donors]
        run.progress.say(f"{recipe.name}: running {len(donors)} donors together on {len(search)} samples")
        resources, held = _resources(run), engines.leave_room()
        if greedy:
            task = compute_task(greedy_donors, **resources, on_held_cpus=held).remote(run.config.base, donors, search)
        else:
            by_module = recipe.weighting == "learned_by_module"
            task = compute_task(learn_weights, **resources, on_held_cpus=held).remote(run.config.base, donors, search, by_module)
        candidates.write_json(file, {"found": ray.get(task)})
    found = candidates.read_json(file)["found"]
    if greedy:
        return of_fewer(recipe, found, catalogue, run.config.merge)
    weights, by_module = found
    module_weights = by_module and {module: tuple(row) for module, row in by_module.items()}
    return replace(recipe, weights=tuple(weights), module_weights=module_weights)


def probe_starts(
    run: Run, engines: Engines, short_list: list[Scored], catalogue: pa.Table, drawn: pa.Table
) -> dict[str, float | None]:
    """Hold-out losses after a few finetuning steps from the base and from each of a short list, if that is asked for."""
    config = run.config
    if not (config.merge.probe and short_list):
        return {}
    data = run.folder.sub("candidates", "probe", "data")
    write_probe_data(run.folder.sub("data"), split_of(drawn, "holdout"), data)
    train = config.train.model_copy(update={"evaluations": 1})
    last = min(config.merge.probe, train.steps)
    engines.close()  # whose place the probe needs
    folded = not is_trained_on(config, "mashup")
    best = run.folder.sub("candidates", short_list[0].recipe.name)
    # The base's, too: a larger rank alone learns faster.
    shape = usual_shape(config.base, catalogue, config.merge.rank) if folded else shape_at(best)
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
    built, refused = _merged(run, engines, fitting, indexed_by_id(catalogue))
    for name, reason in (over | refused).items():
        run.progress.say(f"refused: {name}: {reason}")
    if not built:
        raise InputError(f"no recipe can be merged: {next(iter((over | refused).values()))}")
    return built


def _merged(
    run: Run, engines: Engines, recipes: dict[str, Recipe], indexed: dict[str, Indexed]
) -> tuple[dict[str, Built], dict[str, str]]:
    """As `build`: on a GPU where the cluster has one. For factored merges, which take a CPU seconds, engines that wait for the
    hold-out race with the GPUs in their hands are not ended; for dense ones they are."""
    given = recipes, indexed, run.config.base, run.folder.sub("candidates")
    dense = any(METHODS[recipe.method].dense for recipe in recipes.values())
    resources = _resources(run)
    if not worker_resources(**resources).gpus or (engines.up and not dense):
        return build(*given)
    task = compute_task(build_on_device, **resources, on_held_cpus=engines.leave_room())
    made: tuple[dict[str, Built], dict[str, str]] = ray.get(task.remote(*given))
    return made


def _resources(run: Run) -> dict[str, Any]:
    """What a task that computes with the base or with donors asks for: what an engine does, so that it waits for a GPU where none
    is up yet."""
    return {"cpus": run.config.search.cpus_per_actor, "gpus": run.config.search.gpus_per_actor}
