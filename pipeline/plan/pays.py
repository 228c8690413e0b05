"""When a mashup pays, said before anything is spent: from what past runs on the same base came to, and this run's own figures.

Each run that had both starts in view leaves its outcome beside the scores, in `<store>/<scope>/outcomes/`, one file a run. The
scope is that of the base; runs see each other's outcomes where they share a store (`search.store`).
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.run_folder import Run
from pipeline.search.scoring import store_of
from pipeline.train.curves import chosen_arms, parity, with_overhead

FOLDER = "outcomes"


def keep_outcome(run: Run, outcomes: Sequence[dict[str, Any]]) -> None:
    """Leave what a run came to for the plans of others: the share of steps and of training time that its start saved until
    parity, which is none where parity was not reached or the verdict is to start from the base. Where a mashup was not compared
    to the end, nothing is left.
    """
    if any("stopped_at" in one for one in outcomes):  # by a hedge, so that parity is not known
        return
    verdict, chosen = run.folder.read_json("selection.json")["verdict"], chosen_arms(outcomes)
    if "base" not in chosen or (verdict == "mashup" and "mashup" not in chosen):
        return
    found = parity(chosen["base"], chosen["mashup"]) if verdict == "mashup" else {"reached": False}
    reached = found["reached"]
    record = {
        "verdict": verdict,
        "method": run.config.train.method,
        "steps_saved": found["steps_saved"] if reached else 0.0,
        "time_saved": 1 - found["train_seconds"] / found["base_seconds"] if reached else 0.0,
    }
    _folder(run).write_json(_name(run), record)


def past_outcomes(run: Run) -> list[dict[str, Any]]:
    """What other runs on this base, trained by the same method, came to."""
    folder = _folder(run)
    names = [name for name in folder.list_files(".json") if name != _name(run) and folder.is_complete(name)]
    found = [folder.read_json(name) for name in names]
    return [record for record in found if record["method"] == run.config.train.method]


def foretell(past: Sequence[Mapping[str, Any]], overhead: float | None, base_seconds: float | None) -> dict[str, Any]:
    """What the plan says of it, by the maths of `curves.with_overhead` and the mean of what past runs saved.

    Args:
        overhead: seconds that finding and merging donors will take; None: nobody measured that.
        base_seconds: of one training from the base, evaluations and start apart; None likewise.
    """
    known: dict[str, Any] = {"past_runs": len(past), "overhead_seconds": overhead, "base_seconds": base_seconds}
    if not past:
        return known
    known |= {name: fmean(record[name] for record in past) for name in ("steps_saved", "time_saved")}
    known["mashups"] = sum(record["verdict"] == "mashup" for record in past)
    if overhead is None or base_seconds is None:
        return known
    trained = (1 - known["time_saved"]) * base_seconds
    return known | with_overhead({"train_seconds": trained, "base_seconds": base_seconds}, overhead)


def cost_of_base(run: Run, outcomes: Sequence[dict[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    """What it cost to learn that no donor helps: seconds of the stages before training, and as a share of one training from the
    base. For the summary; nothing where the verdict is another."""
    if run.folder.read_json("selection.json")["verdict"] != "base":
        return {}
    seconds = sum(run.ledger.seconds(stage) for stage in stages)
    base = chosen_arms(outcomes).get("base")
    share = seconds / fmean(arm["curve"][-1]["seconds"] for arm in base) if base else None
    return {"verdict_cost": {"seconds": seconds, "share_of_base": share}}


def _folder(run: Run) -> Folder:
    return store_of(run).folder.sub(FOLDER)


def _name(run: Run) -> str:
    return f"{digest(run.folder.uri)}.json"
