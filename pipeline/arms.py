"""What the arms of a comparison are: an init at a learning rate and a seed, and all that training it depends on."""

from dataclasses import dataclass

from pipeline.config import TrainConfig
from pipeline.storage import Folder

CURVE_FILE = "curve.json"
"""In each checkpoint: the curve up to it."""


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
    """The adapter that every arm trains, so that inits differ in nothing else."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """All that a training worker needs. `start` is the folder of the adapter to start from; the init 'base' does not read it."""

    arm: Arm
    base: str
    lora: Lora
    train: TrainConfig
    data: Folder
    start: Folder
    key: str
    """Digest of all that the arm's result depends on."""

    @property
    def name(self) -> str:
        """Unique among the arms that a run ever had: Ray Train goes on with a run of the same name."""
        return f"{self.arm.name}-{self.key}"
