"""The stage `samples`: rows of the target task -> samples.parquet and data/."""

from pipeline.config import Config
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.data.splits import draw_samples, split_of, target_paths
from pipeline.model.base_model import fingerprint
from pipeline.run_folder import Run


def samples(run: Run) -> None:
    """Draw the sample of the target task and tokenise its training splits."""
    config = run.config
    files = [Folder.at(path).state() for path in target_paths(config).values()]
    key = digest(fingerprint(config.base), config.target.model_dump(), files, _sampling(config))
    if run.ready("samples", key):
        return
    with run.ledger.perform("samples", key):
        drawn = draw_samples(config, run.folder, run.held)
        run.check()
        sizes = {split: len(split_of(drawn.sample, split)) for split in ("search", "holdout")} | drawn.sizes
        run.folder.write_json("samples.json", sizes | {"rows": drawn.counts})
        run.folder.write_table("samples.parquet", drawn.sample)
    run.progress.say(", ".join(f"{count} {name}" for name, count in sizes.items()))
    passed_over = {k: n for counts in drawn.counts.values() for k, n in counts.items() if k != "used" and n}
    if passed_over:
        run.progress.say("passed over: " + ", ".join(f"{count} x {problem}" for problem, count in passed_over.items()))


def _sampling(config: Config) -> tuple[int, float, int]:
    return config.search.samples, config.search.holdout, config.search.seed
