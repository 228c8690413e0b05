"""One target of a refresh: the stages up to the merge, or the comparison, in a run folder of its own, and what comes of them."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from pipeline.adapters.index import index
from pipeline.config import Config, TargetConfig
from pipeline.core.errors import one_line
from pipeline.core.progress import Progress
from pipeline.core.storage import Folder
from pipeline.data.sample import samples
from pipeline.data.splits import target_paths
from pipeline.refresh.publish import CURRENT, chosen, publish, publish_finetuned, training_key
from pipeline.run import compare, search_and_merge, search_for_merge
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines
from pipeline.train.ray_train import require_workers


def index_pool(config: Config, folder: Folder) -> Run:
    """Check the pool once for all targets of a refresh, in a run folder that holds nothing else.

    Raises:
        InputError: the base or the pool is not right.
    """
    run = Run(config.model_copy(update={"run": folder.uri, "target": TargetConfig(train="-")}))
    with run.locked():
        index(run)
    return run


class Target:
    """What a refresh does for one target."""

    def __init__(self, config: Config, pool: Run, finetunes: bool = False) -> None:
        """`pool`: the run that checked the pool. `finetunes`: whether there is to be room for training, too."""
        self.run, self._pool = Run(config, _require_workers) if finetunes else Run(config), pool
        self._before: tuple[str, int] | None = None

    def prepare(self) -> None:
        """Take the catalogue over, and draw the samples.

        Raises:
            InputError: the target is not right.
        """
        target_paths(self.run.config)
        self.run.save_config()
        _take_index(self.run, self._pool)
        samples(self.run)
        self._before = self._before or _searched(self.run)

    def renew(self, engines: Engines, published: Folder, threshold: float, check: Callable[[], None]) -> dict[str, Any]:
        """Score what is new, select and merge anew where that may change, and publish what is worth it.

        Args:
            published: the target's published mashups.
            threshold: see `publish`.
            check: raises where publishing is not allowed any more.

        Returns:
            Columns of the history.

        Raises:
            InputError: the target is not right.
            LockTakenError: somebody works in the target's run folder by hand.
        """
        run = self.run
        with run.locked():
            self.prepare()
            search_and_merge(run, engines)
            check()
            outcome, current = publish(run, engines, published, threshold)
        return _columns(run) | {"adapter_samples": self._scored(), "outcome": outcome, "mashup": current["uri"]}

    def finetune(self, published: Folder, check: Callable[[], None]) -> dict[str, Any]:
        """Finetune from what was chosen, and publish the weights, unless those that are published are still what that gives.

        Args:
            published, check: as of `renew`, which comes before.

        Returns:
            Where the weights are, to be reported.

        Raises:
            InputError, LockTakenError: as `renew`.
        """
        with self.run.locked():
            current = published.read_json(CURRENT)
            key, found = training_key(self.run, current), current.get("finetuned")
            if not found or found["key"] != key:
                compare(self.run)
                check()
                found = publish_finetuned(self.run, published, key)
        return {"finetuned": found["uri"]}

    def _scored(self) -> int:
        """Adapter-samples since it was prepared."""
        key_now, spent = _searched(self.run)
        key, before = self._before or ("", 0)
        return spent - (before if key == key_now else 0)


def search_side_by_side(targets: Mapping[str, Target], engines: Engines) -> None:
    """Search for several targets at once, so that an adapter is read once for all of them. Those that share samples follow one
    another, as what is scored for one of them need not be scored for the other.

    Whatever goes wrong is left to `Target.renew`, which meets it again.
    """
    with ExitStack() as locks:
        together, seen = list[Run](), set[str]()
        for name, target in targets.items():
            run = target.run
            try:
                locks.enter_context(run.locked())
                target.prepare()
                drawn = set(run.folder.read_table("samples.parquet")["sample_id"].to_pylist())
            except Exception as error:
                run.progress.say(f"not searched with the others: {one_line(error)}")
                continue
            if drawn.isdisjoint(seen):
                run.progress.about = name
                together.append(run)
                seen |= drawn
        try:
            search_for_merge(together, engines)
        except Exception as error:
            Progress().say(f"the targets are searched one by one: {one_line(error)}")
        for run in together:
            run.progress.about = ""


def _require_workers(run: Run) -> None:
    require_workers(run.config.train)


def _take_index(run: Run, pool: Run) -> None:
    """Take the catalogue over."""
    key = pool.ledger.key("index")
    if run.ledger.done("index", key):
        return
    with run.ledger.perform("index", key) as details:
        details |= pool.ledger.records["index"]["details"]
        run.folder.write_table("catalogue.parquet", pool.folder.read_table("catalogue.parquet"))


def _searched(run: Run) -> tuple[str, int]:
    """The key of the last search and the adapter-samples that it scored, over all attempts."""
    record = run.ledger.records.get("search", {"key": "", "details": {}})
    return record["key"], record["details"].get("adapter_samples", 0)


def _columns(run: Run) -> dict[str, Any]:
    selection = run.folder.read_json("selection.json")
    best = chosen(selection)
    return {
        "candidates": len(run.folder.read_table("leaderboard.parquet")) - 1,
        "verdict": selection["verdict"],
        "recipe": best.get("name"),
        "donors": [donor["adapter_id"] for donor in selection["donors"]],
        "holdout_nll": best.get("holdout_nll"),
        "base_holdout_nll": selection["base_holdout_nll"],
        "nll_minus_base": best.get("holdout_nll_minus_base"),
    }
