"""The arms of a run: what each trains, from which start, on which rows."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.adapters.adapter import alpha_at, text_targets
from pipeline.config import MOVED, RIVALS, Config
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.model.base_model import fingerprint
from pipeline.run_folder import Run
from pipeline.train.arm import Arm, Job, Lora, rows_digest
from pipeline.train.hedge import STARTS, decision_step

AUTO_RANK = 32
"""Of mashups and of what the arms train, whatever the number of donors: so that recipes differ in their donors alone, and a start
has rank beside them in which it can learn."""


def trained_rank(largest: int, asked: int | str) -> int:
    """auto: AUTO_RANK, or the largest donor's rank above that."""
    return asked if isinstance(asked, int) else max(largest, AUTO_RANK)


def list_arms(config: Config, starts: list[str]) -> list[Arm]:
    inits = [init for init in config.compare.inits if init in starts] or ["base"]
    return [Arm(init, lr, seed) for init in inits for lr in config.train.learning_rates for seed in config.train.seeds]


def decided_at(config: Config, arms: Sequence[Arm]) -> int | None:
    """The step at which a hedge decides between these arms; None: there is nothing to decide."""
    hedged = config.compare.mode == "hedge" and {arm.init for arm in arms} == set(STARTS)
    return decision_step(config.train.steps) if hedged else None


def make_jobs(run: Run, arms: Sequence[Arm], lora: Lora) -> list[Job]:
    """The arms with all that training them depends on. Equal weights to start from make equal jobs, whatever led to them.

    Args:
        lora: the shape of what is trained, where that is an adapter.
    """
    config = run.config
    rows, budget = _rows(run), _budget(config)
    hedged = ["hedge"] if decided_at(config, arms) else []
    starts = {
        init: run.folder.sub("mashup") if init == "mashup" else run.folder.sub("starts", init)
        for init in {arm.init for arm in arms}
    }
    keys = {
        init: digest(rows, budget, lora.rank, lora.alpha, lora.target_modules, _weights(start), *_moved(init), *hedged)
        for init, start in starts.items()
    }
    return [
        Job(
            arm,
            config.base,
            lora,
            config.train,
            run.folder.sub("data"),
            starts[arm.init],
            keys[arm.init][:8],
            not is_trained_on(config, arm.init),
            moved=arm.init in MOVED,
        )
        for arm in arms
    ]


def _moved(init: str) -> list[str]:
    return ["moved"] if init in MOVED else []


def _rows(run: Run) -> str:
    """Digest of the rows that arms train on and are chosen by, wherever they were read from."""
    data = run.folder.sub("data")
    return digest(fingerprint(run.config.base), [rows_digest(data, split) for split in ("train", "validation")])


def probed_training(config: Config) -> dict[str, Any] | None:
    """What a probe depends on of the training that is asked for; None: there is no probe."""
    train = config.train
    return _budget(config) | {"lr": train.learning_rates[0], "seed": train.seeds[0]} if config.merge.probe else None


def _budget(config: Config) -> dict[str, Any]:
    """What is asked of every arm alike."""
    return config.train.model_dump(exclude={"learning_rates", "seeds"})


def _weights(start: Folder) -> list[Any] | None:
    """What tells an adapter's delta weights and its shape; None where there is none. Lists in its config come in any order."""
    if not start.exists(CONFIG_FILE):
        return None
    lora = shape_at(start)
    return [hashlib.sha256(start.read_bytes(WEIGHTS_FILE)).hexdigest(), lora.rank, lora.alpha, lora.target_modules]


def is_trained_on(config: Config, init: str) -> bool:
    """Whether the adapter of a start is itself trained on, rather than folded into the base. The paper always trains on, as do
    starts without donors."""
    return config.train.method != "full" and (config.merge.method != "fold" or init in ("paper", *RIVALS))


@dataclass(frozen=True)
class Shapes:
    """Of adapters: `trained`, those that the arms train, where they do; `start`, those that they start from."""

    trained: Lora
    start: Lora


def shapes_of(run: Run, catalogue: pa.Table) -> Shapes:
    """The shapes that a comparison has; without a mashup, or beside one that is folded, the usual one."""
    usual = usual_shape(run.config.base, catalogue, run.config.merge.rank)
    start = shape_at(run.folder.sub("mashup")) if run.folder.exists("mashup") else usual
    return Shapes(start if is_trained_on(run.config, "mashup") else usual, start)


def shape_at(adapter: Folder) -> Lora:
    content = adapter.read_json(CONFIG_FILE)
    return Lora(content["r"], float(content["lora_alpha"]), tuple(sorted(content["target_modules"])))


def usual_shape(base: str, catalogue: pa.Table, asked: int | str) -> Lora:
    """What is trained where no mashup has a shape: modules of most adapters, and what learns as fast as they do.

    Args:
        catalogue: the valid adapters.
        asked: `merge.rank`.
    """
    columns = catalogue.select(["rank", "alpha", "target_modules"]).to_pylist()
    shapes = Counter((row["rank"], row["alpha"], tuple(row["target_modules"])) for row in columns)
    rank, alpha, modules = shapes.most_common(1)[0][0]
    trained = trained_rank(rank, asked)
    return Lora(trained, alpha_at(trained, rank, alpha / rank), tuple(text_targets(modules, base)))
