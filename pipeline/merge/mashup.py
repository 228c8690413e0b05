"""The stage `merge`: leaderboard -> recipes -> candidates -> selection.json and mashup/."""

from pipeline.adapters.catalogue import valid_adapters_of
from pipeline.config import SHORT_LIST
from pipeline.core.file_names import CONFIG_FILE
from pipeline.core.ledger import digest
from pipeline.core.tables import LEADERBOARD, SAMPLES, require
from pipeline.merge.candidates import probe_starts, score_recipes
from pipeline.merge.past_verdicts import chosen_candidate, foretell_verdict
from pipeline.merge.selection import propose, ranked, selection
from pipeline.report.model_card import model_card
from pipeline.run_folder import Run
from pipeline.search.engine_pool import Engines
from pipeline.train.arm import copy_weights
from pipeline.train.starts import probed_training


def merge_donors(run: Run, engines: Engines | None = None) -> None:
    """Choose donors and merge them, or nobody: each candidate merge is scored on the hold-out samples by the same engine.

    Args:
        engines: as in `search`.
    """
    run.needs("search", "the leaderboard", "mashup search")
    key = merge_key(run)
    if run.ready("merge", key):
        return
    engines = engines or Engines(run.config.search)
    catalogue = valid_adapters_of(run.folder)
    leaderboard = require(run.folder.read_table("leaderboard.parquet"), LEADERBOARD, "leaderboard.parquet")
    drawn = require(run.folder.read_table("samples.parquet"), SAMPLES, "samples.parquet")
    with run.ledger.perform("merge", key) as details:
        proposed = propose(leaderboard, catalogue, run.config.merge)
        scored, base_nll = score_recipes(run, engines, proposed, catalogue, drawn, details)
        contamination = run.folder.read_json("contamination.json")
        probed = probe_starts(run, engines, ranked(scored)[:SHORT_LIST], catalogue, drawn)
        choice = selection(scored, leaderboard, catalogue, contamination, base_nll, probed)
        run.check()
        if choice["recipe"]:
            choice["foretold"] = foretell_verdict(run, chosen_candidate(choice)["holdout_nll_minus_base"])
            copy_weights(run.folder.sub("candidates", choice["recipe"]["name"]), run.folder.sub("mashup"))
            choice["whole_layers"] = run.folder.read_json(f"mashup/{CONFIG_FILE}").get("modules_to_save") or []
            card = model_card(choice, run.config, run.folder.read_json("samples.json"))
            run.folder.write_text("mashup/README.md", card)
        run.folder.write_json("selection.json", choice)
    run.progress.say(f"verdict: start from the {choice['verdict']}; {choice['why']}")


def merge_key(run: Run) -> str:
    """What the merge depends on, as a digest."""
    return digest(run.ledger.key("search"), run.config.merge.model_dump(), probed_training(run.config))
