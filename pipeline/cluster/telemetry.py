"""What a run tells those who watch its cluster: Ray metrics, and log lines of workers that say where they come from.

Each node gives its metrics at its metrics endpoint, in Prometheus' format; Ray puts `ray_` before the names and labels the node
and, as WorkerId, the run's driver; `run` is the run's folder, or the home of refreshes. Without a cluster nothing is told; of
refreshes `refresh/status.py` writes the same into files.
"""

import logging
from collections.abc import Mapping
from functools import cache

import ray
from ray.util import get_node_ip_address
from ray.util.metrics import Gauge

METRICS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "mashup_stage_seconds": ("Wall-clock of a stage over all attempts at it, in seconds.", ("run", "stage")),
    "mashup_search_engines": ("Scoring engines that have come up since the race began.", ("run",)),
    "mashup_search_rung": ("The rung that the race is in, counted from 1.", ("run",)),
    "mashup_search_outstanding": ("Queue: candidates of the rung that have no scores yet.", ("run",)),
    "mashup_search_adapter_samples": ("Pairs of a candidate and a sample that the race has scored.", ("run",)),
    "mashup_search_tokens_per_second": ("Tokens a second that one engine scores, the mean over the race.", ("run",)),
    "mashup_train_tokens_per_second": ("Tokens a second of an arm, padding included, evaluation apart.", ("run", "arm")),
    "mashup_refresh_last_success_timestamp_seconds": ("When a target was last up to date, since 1970.", ("run", "target")),
    "mashup_refresh_outcomes": ("How often refreshes ended so for a target.", ("run", "target", "outcome")),
}
"""Name -> what it is, with its unit, and its tags. All are gauges."""

LINE = "%(asctime)s %(levelname)s stage=%(stage)s adapter=%(adapter)s node=%(node)s %(message)s"

WorkerLog = logging.LoggerAdapter[logging.Logger]


def tell(name: str, value: float, run: str, **tags: str) -> None:
    """Set one of METRICS."""
    if ray.is_initialized():
        _gauge(name).set(value, {"run": run, **tags})


def tell_stage(run: str, stage: str, seconds: float) -> None:
    tell("mashup_stage_seconds", seconds, run, stage=stage)


def tell_training(run: str, arm: str, tokens: int, seconds: float) -> None:
    """How fast an arm trains: `tokens` in `seconds` so far."""
    if seconds:
        tell("mashup_train_tokens_per_second", tokens / seconds, run, arm=arm)


def tell_refresh(home: str, target: str, last_success: float, outcomes: Mapping[str, int]) -> None:
    """How the refreshes of a target went so far."""
    tell("mashup_refresh_last_success_timestamp_seconds", last_success, home, target=target)
    for outcome, count in outcomes.items():
        tell("mashup_refresh_outcomes", count, home, target=target, outcome=outcome)


def worker_log(stage: str, adapter: str = "-") -> WorkerLog:
    """A log for a Ray worker, on its standard error, which Ray keeps among the session's logs on that node. Each line names the
    stage, the adapter (several with commas, an arm by its name; -: none) and the node (its address and the start of its id)."""
    return WorkerLog(_logger(), {"stage": stage, "adapter": adapter, "node": _node()})


def _node() -> str:
    if not ray.is_initialized():
        return str(get_node_ip_address())
    return f"{get_node_ip_address()}/{ray.get_runtime_context().get_node_id()[:8]}"


@cache
def _gauge(name: str) -> Gauge:
    description, tags = METRICS[name]
    return Gauge(name, description, tags)


@cache
def _logger() -> logging.Logger:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LINE))
    logger = logging.getLogger("mashup")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger
