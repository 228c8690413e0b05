"""Starts that a mashup should be better than, made for the comparison alone."""

import random
from collections.abc import Sequence

import pyarrow as pa
import ray

from pipeline.adapters.adapter import read_adapter
from pipeline.adapters.catalogue import indexed_by_id
from pipeline.adapters.fetch import fetch_adapter
from pipeline.cluster.resources import compute_task
from pipeline.config import RIVALS
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.node_folder import temporary_folder
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.data.splits import split_of
from pipeline.merge.build import build, store
from pipeline.merge.recipes import Recipe, random_like
from pipeline.model.base_model import linear_shapes
from pipeline.run_folder import Run
from pipeline.train.arm import Lora
from pipeline.train.starts import Shapes, is_trained_on


def control_recipes(leaderboard: pa.Table, catalogue: pa.Table, n_donors: int, rank: int) -> dict[str, Recipe]:
    """Recipes of starts that a mashup should be better than, at a given rank.

    paper: A and B of the two best donors averaged apart (arXiv 2603.10156; its code takes two). best_donor: the first of the
    leaderboard. random_donors: as many as the mashup has, or three, drawn from the valid adapters with a fixed seed.
    """
    by_loss = [row["adapter_id"] for row in leaderboard.to_pylist() if row["adapter_id"] != BASE_ID]
    pool = sorted(catalogue["adapter_id"].to_pylist())
    drawn = random.Random(0).sample(pool, min(n_donors or 3, len(pool)))
    controls = {"paper": (by_loss[:2], "ab_mean"), "best_donor": (by_loss[:1], "exact"), "random_donors": (drawn, "exact")}
    return {
        init: Recipe(tuple(donors), (1 / len(donors),) * len(donors), method, rank)
        for init, (donors, method) in controls.items()
        if donors
    }


def make_controls(run: Run, n_donors: int, catalogue: pa.Table, shapes: Shapes) -> list[str]:
    """Make the control starts that are asked for, in `starts/`. Gives those that there are.

    Args:
        n_donors: of the mashup.
        catalogue: the valid adapters.
    """
    asked = [init for init in run.config.compare.inits if init not in ("base", "mashup")]
    if not asked:
        return []
    starts, modules = run.folder.sub("starts"), list(shapes.trained.target_modules)
    lacking = [init for init in asked if not all(starts.is_complete(f"{init}/{file}") for file in (CONFIG_FILE, WEIGHTS_FILE))]
    refused = _write_controls(run, lacking, starts, n_donors, catalogue, shapes)
    for init in asked:
        if init in refused or not is_trained_on(run.config, init):
            continue
        if sorted(starts.read_json(f"{init}/{CONFIG_FILE}")["target_modules"]) != modules:
            refused[init] = "its donors adapt other modules than the arms"
    for name, reason in refused.items():
        run.progress.say(f"start {name} is left out: {reason}")
    return [init for init in asked if init not in refused]


def _write_controls(
    run: Run, inits: Sequence[str], starts: Folder, n_donors: int, catalogue: pa.Table, shapes: Shapes
) -> dict[str, str]:
    """Write control starts; gives the reasons of those that cannot be made."""
    base, leaderboard = run.config.base, run.folder.read_table("leaderboard.parquet")
    refused: dict[str, str] = {}
    _write_rivals(run, [init for init in inits if init in RIVALS], starts, shapes.trained)
    for init in [init for init in inits if init not in RIVALS]:
        shape = shapes.trained if is_trained_on(run.config, init) else shapes.start
        recipes = control_recipes(leaderboard, catalogue, n_donors, shape.rank)
        made = {init: recipes[init]} if init in recipes else {}
        refused |= build(made, indexed_by_id(catalogue), base, starts, shape.alpha)[1]
    if "random_delta" in inits and not n_donors:
        refused["random_delta"] = "there is no mashup whose norm it could have"
    elif "random_delta" in inits:
        with temporary_folder() as cache:
            mashup = read_adapter(fetch_adapter(run.folder.sub("mashup").uri, cache), base=base)
        store(random_like(mashup, base, linear_shapes(base)[0]), starts, "random_delta", base)
    return refused


def _write_rivals(run: Run, inits: Sequence[str], starts: Folder, lora: Lora) -> None:
    """Write starts that need no donors, one after the other, as each takes the base; those that read data have the sample that
    the donors were ranked on."""
    if not inits:
        return
    from pipeline.train.rivals import write_rival  # not above: see pipeline/train/ray_train.py

    run.start_ray()
    config, train = run.config, run.config.train
    sample = ray.put(split_of(run.folder.read_table("samples.parquet"), "search"))
    task = compute_task(write_rival, train.cpus_per_worker, train.gpus_per_worker)
    for init in inits:
        ray.get(task.remote(init, config.base, train.dtype, lora, sample, starts))
        run.progress.say(f"start {init} is made")
