"""The donor search as a job: index, samples and search, without a merge or a finetune.

    python -m jobs.search CONFIG.yaml [--run RUN]

The last line has the first places of the leaderboard; see `jobs/entry.py`. `jobs.mashup` with the same run goes on from there.
"""

from typing import Any

from jobs.entry import RUN, arguments, run_job

PLACES = 10
COLUMNS = ["place", "adapter_id", "n_samples", "nll", "nll_minus_base"]


def search(config: str, run: str | None) -> dict[str, Any]:
    """Rank the pool, going on where an earlier attempt stopped."""
    from pipeline.config import load_config

    asked = load_config(config, run=run)  # before what brings torch and Ray: a mistake in it is said at once
    from pipeline.run import run_search

    folder = run_search(asked)
    leaderboard = folder.read_table("leaderboard.parquet").select(COLUMNS)
    return {"run": folder.uri, "leaderboard": leaderboard.slice(0, PLACES).to_pylist()}


def main() -> None:
    asked = arguments(__doc__, run=RUN)
    run_job(lambda: search(asked.config, asked.run))


if __name__ == "__main__":
    main()
