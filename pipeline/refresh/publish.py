"""The mashups that others use: `published/<target>/<time>-<digest>/`, and `current.json` beside them: which one counts.

A version is never changed, and `current.json` is written last: who reads it finds a whole mashup, or that the base is the better
start (`uri` null). Where a refresh trains, `finetuned` says where the finetuned weights are, and what they started from; those of
the last version count until there are newer ones.
"""

import math
from datetime import UTC, datetime
from typing import Any

from pipeline.adapters.adapter import hash_of
from pipeline.adapters.catalogue import valid_adapters_of
from pipeline.adapters.fetch import fetch_adapter
from pipeline.core.base_ref import name_of
from pipeline.core.ledger import digest
from pipeline.core.node_folder import temporary_folder
from pipeline.core.stats import best_init, mean_per_token
from pipeline.core.storage import Folder
from pipeline.model.base_model import fingerprint
from pipeline.run_folder import Run
from pipeline.search.batch import candidates_table
from pipeline.search.engine_pool import Engines
from pipeline.search.scoring import score_on_holdout
from pipeline.train.arm import rows_digest

CURRENT = "current.json"

Json = dict[str, Any]


def publish(run: Run, engines: Engines, published: Folder, threshold: float) -> tuple[str, Json]:
    """Publish what a run selected, if that is another selection than the published one, or better by `threshold`.

    Args:
        published: the target's published mashups.
        threshold: nats a completion token on the run's hold-out samples.

    Returns:
        What was done (published; withdrawn, where a mashup was published and the base is better now; kept), and what now counts.
    """
    current = published.read_json(CURRENT) if published.exists(CURRENT) else None
    found = _describe(run)
    if current and not _is_news(run, engines, current, found, threshold):
        return "kept", current
    now = datetime.now(UTC)
    if found["verdict"] == "mashup":
        found["uri"] = _copy(run.folder, "mashup", "selection.json", published.sub(_version(now, found["adapter_hash"])))
        outcome = "published"
    else:
        outcome = "withdrawn" if current else "kept"
    found |= {"time": _written(now), "finetuned": (current or {}).get("finetuned")}
    published.write_json(CURRENT, found)
    return outcome, found


def training_key(run: Run, current: Json) -> str:
    """Digest of what finetuned weights depend on: the published start, the rows, and how they are trained on."""
    data, train = run.folder.sub("data"), run.config.train
    rows = [rows_digest(data, split) for split in ("train", "validation")]
    return digest(current["base_fingerprint"], current["adapter_hash"], rows, train.model_dump())


def publish_finetuned(run: Run, published: Folder, key: str) -> Json:
    """Publish what a run finetuned, beside the mashup. Returns what now counts.

    Args:
        key: as of `training_key`.
    """
    now, start = datetime.now(UTC), best_init(run.folder.read_json("summary.json")["inits"])
    uri = _copy(run.folder, "finetuned", "summary.json", published.sub(f"{_version(now, key)}-finetuned"))
    found = {"uri": uri, "start": start, "key": key, "time": _written(now)}
    published.write_json(CURRENT, published.read_json(CURRENT) | {"finetuned": found})
    return found


def chosen(selection: Json) -> Json:
    """The candidate that was chosen, with its losses; of a verdict for the base, nothing."""
    name = (selection["recipe"] or {}).get("name")
    return next((one for one in selection["candidates"] if one["name"] == name), {})


def _describe(run: Run) -> Json:
    """What a reader, and the next refresh, should know of a selection."""
    selection = run.folder.read_json("selection.json")
    best = chosen(selection)
    return {
        "uri": None,
        "verdict": selection["verdict"],
        "base": name_of(run.config.base),
        "base_fingerprint": fingerprint(run.config.base),
        "adapter_hash": _hash(run.folder.sub("mashup").uri) if best else None,
        "recipe": best.get("name"),
        "rank": best.get("rank"),
        "donors": [{key: donor[key] for key in ("adapter_id", "adapter_hash", "weight")} for donor in selection["donors"]],
        "holdout_nll": best.get("holdout_nll"),
        "base_holdout_nll": selection["base_holdout_nll"],
    }


def _is_news(run: Run, engines: Engines, current: Json, found: Json, threshold: float) -> bool:
    """Whether a selection is worth publishing in place of the current one."""
    if _identity(current) != _identity(found):
        return True
    if current["adapter_hash"] == found["adapter_hash"]:
        return False
    gain = _loss_now(run, engines, current) - found["holdout_nll"]
    return math.isnan(gain) or gain >= threshold


def _identity(described: Json) -> tuple[str, str, list[str]]:
    """Verdict, base and donors; donors by their content, which may change under a name."""
    donors = sorted(donor["adapter_hash"] for donor in described["donors"])
    return described["verdict"], described["base_fingerprint"], donors


def _loss_now(run: Run, engines: Engines, current: Json) -> float:
    """The published mashup's loss on the hold-out samples of today, in nats a completion token; NaN: it cannot be scored any
    more. A mashup that is among today's candidates was scored with them."""
    run.start_ray()
    published = candidates_table(["published"], [current["uri"]], [current["adapter_hash"]])
    catalogue, drawn = valid_adapters_of(run.folder), run.folder.read_table("samples.parquet")
    known, _ = score_on_holdout(run, engines, published, catalogue, drawn, current["rank"], {})
    return mean_per_token(known.nll_NS[1], known.tokens_S.astype(float)).mean


def _copy(run: Folder, weights: str, about: str, target: Folder) -> str:
    """Copy weights of a run with their card, and the file that is about them. Returns where they are now."""
    for file in run.sub(weights).list_files():
        target.copy_file(file, run.sub(weights))
    target.copy_file(about, run)
    return target.uri


def _version(now: datetime, key: str) -> str:
    return f"{now:%Y%m%dT%H%M%SZ}-{key[:8]}"


def _written(now: datetime) -> str:
    return f"{now:%Y-%m-%dT%H:%M:%SZ}"


def _hash(uri: str) -> str:
    """The adapter_hash of a merged adapter, as the catalogue has it of donors."""
    with temporary_folder() as cache:
        return hash_of(fetch_adapter(uri, cache))
