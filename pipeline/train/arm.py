"""What the arms of a comparison are: an init at a learning rate and a seed, and all that training it depends on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline.config import TrainConfig
from pipeline.core.parts import Parts
from pipeline.core.storage import Folder

CURVE_FILE = "curve.json"
"""In each checkpoint beside the weights: the curve up to it."""
STATE = "trainer_state"
"""Begins the names of the files with what going on from a checkpoint needs, one of each worker that holds a share of it."""


RESULT_FILE = "result.json"
"""In an arm's folder: what came out of it, once it is at its end."""
HELD_FILE = "held.json"
"""Likewise, of an arm that waits for a decision, or was stopped by it: see `pipeline/train/hedge.py`."""

SECONDS_FILE = "seconds.json"
"""Beside a start that needs no donors: what it took to make it, the base's loading included."""

CHECKPOINTS = "checkpoint_"
"""Begins the names that Ray Train gives to checkpoints."""


@dataclass(frozen=True)
class Arm:
    """One training run of a comparison."""

    init: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.init}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """All that a training worker needs. `start` is the folder of the adapter to start from; the init 'base' does not read it.

    An adapter to start from is itself trained on, or it is `folded`: added to the base's weights, which stay frozen under a fresh
    adapter, or are all trained where the method is full.
    """

    arm: Arm
    base: str
    lora: Lora
    """What is trained where that is an adapter; the same for every arm, so that inits differ in nothing else."""
    train: TrainConfig
    data: Folder
    start: Folder
    key: str
    """Digest of all that the arm's result depends on."""
    folded: bool = False
    last_step: int | None = None
    """Stop after this step; the learning rates stay those of all steps."""
    profile: Folder | None = None
    """Where the first worker leaves a trace of some steps."""
    moved: bool = False
    """The delta weight of the start is first taken from the frozen base, so that the model before any step is the base."""

    @property
    def full(self) -> bool:
        return self.train.method == "full"

    @property
    def quantised(self) -> bool:
        """Whether the frozen base is in 4 bits."""
        return self.train.quantize != "none"

    @property
    def name(self) -> str:
        """Unique among the arms that a run ever had: Ray Train goes on with a run of the same name."""
        return f"{self.arm.name}-{self.key}"

    @property
    def trace(self) -> str:
        """The file in `profile`."""
        return f"{self.name}.json.gz"


def pass_tokens(train: TrainConfig, gpu: bool) -> int:
    """Padded tokens in one forward and backward pass of a training worker; for `auto` on a GPU a guess, as it is measured there
    (`pipeline/train/passes.py`)."""
    return (8192 if gpu else 1024) if train.tokens_per_pass == "auto" else train.tokens_per_pass


def rows_digest(data: Folder, split: str) -> str:
    """Digest of the rows of a split, in order, however many."""
    found = hashlib.sha256()
    for rows in Parts(data, f"{split}.parquet").batches(["sample_id"]):
        found.update("".join(f"{name}\n" for name in rows["sample_id"].to_pylist()).encode())
    return found.hexdigest()


def row_ids(data: Folder, split: str) -> list[str]:
    """Digests of the single rows of a split, in order."""
    ids: list[str] = data.read_table(f"{split}.parquet", ["sample_id"])["sample_id"].to_pylist()
    return ids


def download_model(checkpoint: Folder, target: Path) -> None:
    """Copy the whole model of a checkpoint to a local folder, without what only going on needs."""
    checkpoint.download([name for name in checkpoint.list_files() if not name.startswith(STATE)], target)


def checkpoints_without(file: str, arms: Sequence[Mapping[str, Any]], storage: Folder) -> dict[str, Folder]:
    """The checkpoints of the arms that have no such file beside their result yet, by the arms' names.

    Args:
        arms: outcomes, with `name` and `checkpoint`.
    """
    left = [arm for arm in arms if not storage.is_complete(f"{arm['name']}/{file}")]
    return {arm["name"]: storage.sub(*arm["checkpoint"].split("/")) for arm in left}


def keep_best(storage: Folder, checkpoint: str) -> None:
    """Remove the other checkpoints of an arm that is at its end, and what of the best one only going on would need: with Adam's
    moments, five times the weights of a full finetune.

    Args:
        checkpoint: the best one, as `ray_train.fit` names it in `storage`.
    """
    name, _, best = checkpoint.rpartition("/")
    arm = storage.sub(name)
    for found in arm.files.get_file_info(fs.FileSelector(arm.path, allow_not_found=True)):
        if found.base_name.startswith(CHECKPOINTS) and found.base_name != best:
            arm.delete(found.base_name)
    for file in arm.sub(best).list_files():
        if file.startswith(STATE):
            arm.delete(f"{best}/{file}")


def copy_weights(source: Folder, target: Folder) -> None:
    """Copy an adapter or a whole model, without PEFT's card and without what only training needs."""
    for file in source.list_files():
        if file not in ("README.md", CURVE_FILE) and not file.startswith(STATE):
            target.copy_file(file, source)
