"""The stage `samples`: rows of the target task -> samples.parquet and data/."""

from collections import Counter
from typing import Any

from pipeline.config import BY_CHOICES, Config
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.data.shards import USED, USED_BUT
from pipeline.data.splits import draw_samples, split_of, target_paths
from pipeline.model.base_model import fingerprint
from pipeline.run_folder import Run


def samples(run: Run) -> None:
    """Draw the sample of the target task and tokenise its training splits."""
    config = run.config
    files = [Folder.at(path).state() for path in target_paths(config).values()]
    with_choices = [True] if config.compare.metric in BY_CHOICES else []
    key = digest(fingerprint(config.base), config.target.model_dump(), files, _sampling(config), *with_choices)
    if run.ready("samples", key):
        return
    with run.ledger.perform("samples", key):
        drawn = draw_samples(config, run.folder, run.held)
        run.check()
        sizes = {split: len(split_of(drawn.sample, split)) for split in ("search", "holdout")} | drawn.sizes
        run.folder.write_json("samples.json", sizes | {"rows": drawn.counts})
        run.folder.write_table("samples.parquet", drawn.sample)
    run.progress.say(", ".join(f"{count} {name}" for name, count in sizes.items()))
    reasons = sum((Counter(counts) for counts in drawn.counts.values()), Counter[str]())
    notes = {name.removeprefix(USED_BUT): reasons.pop(name) for name in [*reasons] if name.startswith(USED_BUT)}
    for what, told in (("passed over", {k: n for k, n in reasons.items() if k != USED}), ("used", notes)):
        if told:
            run.progress.say(f"{what}: " + ", ".join(f"{count} x {reason}" for reason, count in told.items()))


def _sampling(config: Config) -> list[Any]:
    search = config.search
    return [search.samples, search.holdout, search.seed, *(["first"] if search.draw == "first" else [])]
