"""What a run is asked to do: one YAML file, every key but run, base, pool and target.train with a default.

`pipeline/core/settings.py` reads the file and says what is wrong in it.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, GetJsonSchemaHandler, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.core.hub import data_place
from pipeline.core.settings import Section, checked, read_yaml, with_settings
from pipeline.core.storage import lies_in

Auto = Literal["auto"]
SHORT_LIST = 3
"""Candidate merges that a probe tries."""

ON_SAMPLES = ("greedy", "learned", "learned_by_module")
"""Merge weights that are found on the search sample by running the model."""

BY_CHOICES = ("choices", "choices_per_token")
"""Metrics over the choices of a row."""

HARNESS = "lm_eval:"
"""Begins a metric that is a task of lm-eval."""

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A metric of one's own: a function, and the module that it is in."""

MAX_COUNT = 1 << 31
"""Of whatever is counted: rows, workers, tokens."""

MAX_RANK = 1024
"""Of a mashup, and of donors that are merged."""


RIVALS = ("pissa", "olora", "corda", "lora_ga", "eva")
"""Starts that need no donors, as PEFT has them (`train/rivals.py`)."""

MOVED = RIVALS[:-1]
"""Those that begin with a delta weight, which is taken from the base's weights."""


class MergeMethod(NamedTuple):
    """What is known of a merge method by its name; its function is in `merge/recipes.py`."""

    sentence: str
    lossless: bool = False
    """The result has the sum of the donors' ranks."""
    dense: bool = False
    """It works on whole delta weights: in a 7B base an hour a recipe on a CPU."""


METHODS = {
    "exact": MergeMethod("weighted sum of the donors' delta weights (scale x B A), factored by an SVD at the rank below"),
    "concat": MergeMethod(
        "weighted sum of the donors' delta weights, their factors side by side: nothing is lost", lossless=True
    ),
    "fold": MergeMethod(
        "weighted sum of the donors' delta weights, their factors side by side, which training adds to the frozen base",
        lossless=True,
    ),
    "ab_mean": MergeMethod("weighted mean of the donors' A and B matrices, each apart"),
    "ties": MergeMethod("TIES (arXiv 2306.01708) on the donors' delta weights, factored by an SVD at the rank below", dense=True),
    "dare": MergeMethod("DARE (arXiv 2311.03099) on the donors' delta weights, factored by an SVD at the rank below", dense=True),
}
"""All merge methods, by the names that a config gives."""

MethodName = Literal[("auto", *METHODS)]  # type: ignore[valid-type]


COLUMNS = (
    *("messages", "conversations", "conversation", "prompt", "completion", "chosen"),
    *("instruction", "input", "output", "history", "text", "label"),
    *("system", "system_prompt", "tools", "chat_template_kwargs", "choices"),
)
"""Of a target's files; what each is for: `data/forms.py`."""


ROLES = ("train", "validation", "test")
"""Of the splits of a target; of those that share a row the later one keeps it."""


class TargetConfig(Section):
    """The new task's data: files or folders, in the forms of docs/data.md."""

    train: str = Field(description="rows of conversations, of prompt and completion, or in another form (docs/data.md)")
    validation: str | None = Field(None, description="a tenth of train where absent")
    test: str | None = Field(None, description="a tenth of train where absent")
    columns: dict[str, str] = Field({}, description="what columns are called in the files, such as {prompt: question}")
    turns: Literal["all", "last"] = Field("all", description="which answers of a conversation are learned and scored")
    max_tokens: int = Field(1024, ge=8, le=MAX_COUNT, description="longer rows are left out and counted")
    too_long: Literal["drop", "cut"] = Field("drop", description="cut: longer rows lose their first tokens, and are counted")
    validation_rows: int = Field(128, ge=1, le=MAX_COUNT, description="rows used of the validation split, a seeded draw")
    test_rows: int = Field(500, ge=1, le=MAX_COUNT, description="rows used of the test split, a seeded draw")

    @property
    def paths(self) -> dict[str, str]:
        """The splits that are given, by their role."""
        return {role: path for role in ROLES if (path := getattr(self, role)) is not None}

    @field_validator(*ROLES)
    @classmethod
    def data_of_the_hub(cls, value: str | None) -> str | None:
        return value and data_place(value)

    @field_validator("columns")
    @classmethod
    def known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in value if name not in COLUMNS]:
            raise ValueError(f"no column {unknown[0]!r} is read; known: {', '.join(COLUMNS)}")
        return value


class Budget(Section):
    """What a search may spend, in one of three ways. A number alone is a share."""

    share: float | None = Field(
        None, gt=0, le=1, description="of the cost of scoring every candidate on every sample; more in small pools"
    )
    seconds: float | None = Field(None, gt=0, description="of scoring, about; engine start excluded")
    confidence: float | None = Field(
        None,
        gt=0.5,
        lt=1,
        description="drop an adapter only if it is worse than the last finalist, as it stands, at this one-sided level",
    )

    @model_validator(mode="before")
    @classmethod
    def number_is_share(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            return {"share": value}
        if not isinstance(value, dict | Budget):
            problem = "must be a number, or one of share, seconds and confidence with its value"
            raise ValueError(problem)  # noqa: TRY004 (pydantic wants this one)
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """For editors: a number alone, too."""
        section = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"type": "number"}, section], "description": section["description"]}

    @model_validator(mode="after")
    def exactly_one(self) -> "Budget":
        given = [name for name in Budget.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must be one of share, seconds and confidence, not {' and '.join(given) or 'none'}")
        return self


def _resources(value: float | str, info: ValidationInfo) -> float | str:
    """A number of engines, tokens, CPUs or GPUs, of which last alone there may be none; or auto."""
    least = 0 if str(info.field_name).startswith("gpus") else 1e-9
    if not isinstance(value, str) and not least <= value <= MAX_COUNT:
        raise ValueError(f"must be positive, and {MAX_COUNT} at most")
    return value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arms of a comparison are told apart by their init, rate and seed, as they are written."""
    if len({f"{value:g}" if isinstance(value, float) else value for value in values}) < len(values):
        raise ValueError("must not name one twice")
    return values


class SearchConfig(Section):
    """How the pool is scored."""

    retired: ClassVar[dict[str, str]] = {"screen": "one scored sample an adapter ranks donors better than its estimate did"}

    samples: int = Field(
        128,
        ge=2,
        le=MAX_COUNT,
        description="rows of the target's train split to score on; the race shows poor adapters only some",
    )
    holdout: float = Field(0.25, gt=0, lt=1, description="share of the samples kept apart to choose the merge on")
    draw: Literal["random", "first"] = Field(
        "random", description="the samples are a seeded draw of the train split, or its first rows in the order of the files"
    )
    rank_by: Literal["nll", "token_accuracy"] = Field(
        "nll",
        description="what donors are raced and ranked by; token_accuracy: the share of the answers' tokens that are the model's "
        "first choice, as in the paper; on GPUs vLLM tells it with VLLM_USE_V2_MODEL_RUNNER=0 alone",
    )
    seed: int = Field(0, description="of the draw of the samples and of the splits")
    engine: Literal["vllm", "transformers"] = Field(
        "vllm",
        description="what scores; transformers needs no vLLM, is slower, and alone scores trained embeddings and norms",
    )
    budget: Budget = Field(Budget(share=0.1), description="what the search may spend")
    store: str | None = Field(None, description="folder of scores that runs share, local or s3://...; the run's own if absent")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: what the device is fast at")
    adapters_per_batch: int | Auto = Field(
        "auto", description="adapters that one engine scores together; auto: 4 on CPUs, on GPUs up to 32, as their size allows"
    )
    memory_cache_gb: float | Auto = Field(
        "auto", description="memory for adapters that an engine may need again; auto: its share of a quarter of the node's"
    )
    disk_cache_gb: float | Auto = Field(
        "auto",
        description="disk of each node, under TMPDIR, for adapters of object stores; auto: half of what is free, in a Kubernetes "
        "pod 64 at most, as the limit of its volume cannot be seen",
    )
    actors: int | Auto = Field("auto", description="engines at most; auto: as many as the cluster holds")
    cpus_per_actor: float | Auto = Field("auto", description="CPUs of an engine; auto: without GPUs a whole node's")
    gpus_per_actor: int | Auto = Field("auto", description="auto: 1 where the cluster has GPUs; above 1: tensor parallelism")

    @field_validator("actors", "cpus_per_actor", "gpus_per_actor")
    @classmethod
    def in_range(cls, value: float | str, info: ValidationInfo) -> float | str:
        return _resources(value, info)

    @field_validator("adapters_per_batch")
    @classmethod
    def at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= MAX_COUNT:
            raise ValueError(f"must be from 1 to {MAX_COUNT}")
        return value

    @field_validator("memory_cache_gb", "disk_cache_gb")
    @classmethod
    def not_negative(cls, value: float | str) -> float | str:
        if isinstance(value, float | int) and not 0 <= value <= MAX_COUNT:
            raise ValueError(f"must be from 0 to {MAX_COUNT}")
        return value


class MergeConfig(Section):
    """How donors become one adapter."""

    k: int | Auto = Field("auto", description="donors to merge; auto: chosen on the hold-out samples")
    method: MethodName = Field(
        "auto",
        description="auto: exact, with the paper's ab_mean of the best two as a rival; fold: nothing is cut, and training adds "
        "the mashup to the frozen base's weights and trains a fresh adapter on top",
    )
    weights: Literal["auto", "equal", "gains", "greedy", "learned", "learned_by_module"] = Field(
        "auto",
        description="gains: in proportion to each donor's gain over the base; auto: equal and gains are both tried. The others "
        "are found on the search sample, for the most donors, and tried beside equal ones: greedy: donors by forward selection; "
        "learned: one weight a donor, by gradient steps; learned_by_module: one a donor and module",
    )
    rank: int | Auto = Field(
        "auto",
        description="rank of the mashup and of what is trained; auto: 32, or the largest donor's rank above that; concat "
        "and fold have the sum of the donors' ranks",
    )
    probe: int = Field(
        0,
        ge=0,
        le=MAX_COUNT,
        description=f"finetune the base and the best {SHORT_LIST} merges for so many steps and choose by the loss then; 0: off",
    )

    @field_validator("k", "rank")
    @classmethod
    def positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= MAX_RANK:
            raise ValueError(f"must be from 1 to {MAX_RANK}")
        return value

    @model_validator(mode="after")
    def lossless_methods_have_their_own_rank(self) -> "MergeConfig":
        if self.method != "auto" and METHODS[self.method].lossless and self.rank != "auto":
            raise ValueError(
                f"method {self.method} keeps the sum of the donors' ranks; leave merge.rank out, or use method exact"
            )
        return self


class TrainConfig(Section):
    """The finetuning budget, the same for every init."""

    steps: int = Field(100, ge=1, le=1_000_000, description="optimizer steps")
    batch_size: int = Field(16, ge=1, le=1 << 20, description="rows a step over all workers")
    learning_rates: tuple[float, ...] = Field((1e-4, 5e-4), min_length=1, description="peak rates; validation picks one")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of the order of the rows and of fresh weights")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises to its peak")
    lora_plus: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="learning rate of B over that of A in every adapter that is trained (LoRA+, arXiv 2402.12354)",
    )
    method: Literal["lora", "full"] = Field("lora", description="full: all weights, from the base or from base + mashup")
    workers: int = Field(1, ge=1, le=MAX_COUNT, description="data-parallel workers")
    min_workers: int | None = Field(
        None, ge=1, description="elastic training: the fewest to go on with where the cluster has no room for all"
    )
    shard: bool = Field(False, description="workers share the weights out (FSDP2): for bases that do not fit one device")
    tokens_per_pass: int | Auto = Field(
        "auto",
        description="padded tokens in one forward and backward pass; a step takes as many passes as its rows need; auto: 1024 on "
        "CPUs, on GPUs what a measured pass leaves room for; halved where memory runs out",
    )
    quantize: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: the frozen base in 4 bits while adapters are trained (QLoRA; extra quantize); scores and test figures "
        "stay those of the plain base",
    )
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time: activations are computed twice")
    evaluations: int = Field(
        10, ge=1, le=MAX_COUNT, description="evaluations on the validation split over the run, the start apart"
    )
    patience: int = Field(
        0,
        ge=0,
        le=MAX_COUNT,
        description="end an arm after so many evaluations without a lower validation NLL; those of the base always run to the "
        "end, as parity uses their final loss, but in a hedge; 0: never",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen base; with method full, of the matrix products; trained weights are float32"
    )
    cpus_per_worker: float | Auto = Field("auto", description="CPUs of a worker; auto: without GPUs its share of a node's")
    gpus_per_worker: int | Auto = Field("auto", description="0 or 1; auto: 1 where the cluster has GPUs")

    @field_validator("seeds")
    @classmethod
    def seeds_in_range(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [seed for seed in value if not 0 <= seed < 1 << 32]
        if wrong:
            raise ValueError("must be from 0 to 2**32 - 1")
        return value

    @model_validator(mode="after")
    def only_adapters_have_a_and_b(self) -> "TrainConfig":
        if self.method == "full" and self.lora_plus != 1:
            raise ValueError("train.lora_plus is for adapters; leave it out with train.method full")
        return self

    @model_validator(mode="after")
    def fewest_workers_first(self) -> "TrainConfig":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"train.min_workers {self.min_workers} is above train.workers {self.workers}")
        return self

    @model_validator(mode="after")
    def one_gpu_a_worker(self) -> "TrainConfig":
        if self.gpus_per_worker not in ("auto", 0, 1):
            raise ValueError(
                f"train.gpus_per_worker {self.gpus_per_worker}: a worker computes on one GPU; set it to 1 and train.workers to "
                f"{self.workers * int(self.gpus_per_worker)}, and train.shard: true where the base does not fit one"
            )
        return self

    @model_validator(mode="after")
    def four_bits_are_frozen_and_on_one_device(self) -> "TrainConfig":
        if self.quantize == "nf4" and self.method == "full":
            raise ValueError("train.quantize nf4 is of a frozen base, train.method full trains all weights; leave one out")
        if self.quantize == "nf4" and self.shard:
            raise ValueError("train.quantize nf4 keeps the base whole on each device, train.shard shares it out; leave one out")
        return self

    @field_validator("learning_rates", "seeds")
    @classmethod
    def each_once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _distinct(value)

    @field_validator("tokens_per_pass", "cpus_per_worker", "gpus_per_worker")
    @classmethod
    def in_range(cls, value: float | str, info: ValidationInfo) -> float | str:
        return _resources(value, info)

    @field_validator("learning_rates")
    @classmethod
    def rates_positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        wrong = [rate for rate in value if not (rate > 0 and math.isfinite(rate))]
        if wrong:
            raise ValueError(f"must be positive, got {wrong[0]}")
        return value


Init = Literal[("base", "mashup", "paper", "best_donor", "random_donors", "random_delta", *RIVALS)]  # type: ignore[valid-type]


class CompareConfig(Section):
    """Which starts are compared; those beyond base and mashup are controls, see `pipeline/merge/controls.py`."""

    mode: Literal["study", "hedge"] = Field(
        "study",
        description="study: each start is trained to the end. hedge: for the better model at a third more than a plain finetune: "
        "after a third of the steps base or mashup, whichever has the higher validation NLL, is stopped",
    )
    inits: tuple[Init, ...] = Field(
        ("base", "mashup"),
        min_length=1,
        description="starts; random_delta: random weights of the mashup's norm in each module; pissa, olora, corda, lora_ga, "
        "eva: fresh adapters as PEFT begins them, without donors",
    )

    metric: str | None = Field(
        None,
        description="what is measured on the test split besides: choices (accuracy by option likelihood), choices_per_token, "
        "exact_match (of answers that are written), lm_eval:TASK (extra eval), or package.module:function (docs/method.md)",
    )

    @field_validator("inits")
    @classmethod
    def each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value)

    @model_validator(mode="after")
    def a_hedge_is_between_two(self) -> "CompareConfig":
        if self.mode == "hedge" and set(self.inits) != {"base", "mashup"}:
            raise ValueError("compare.mode hedge is between base and mashup; leave compare.inits out, or use mode study")
        return self

    @field_validator("metric")
    @classmethod
    def known_metric(cls, value: str | None) -> str | None:
        if value in (None, *BY_CHOICES, "exact_match") or str(value).startswith(HARNESS) or FUNCTION.fullmatch(str(value)):
            return value
        raise ValueError(f"must be {', '.join(BY_CHOICES)}, exact_match, lm_eval:TASK or package.module:function")


class TrackConfig(Section):
    """Where the training curves go besides the run folder's own tables."""

    tensorboard: bool = Field(False, description="event files in train/tune/ of the run folder")
    mlflow: str | None = Field(
        None,
        description="tracking URI of an MLflow server, such as http://host:5000; MLflow takes credentials from its environment",
    )
    wandb: str | None = Field(
        None,
        description="project of Weights & Biases; the key is that of WANDB_API_KEY, and with WANDB_MODE=offline none is needed",
    )


class Config(Section):
    """A whole run."""

    run: str = Field(description="folder of the run: a local path or s3://...")
    base: str = Field(description="base model: Hub id (org/name, org/name@revision), local folder or s3://...")
    pool: str = Field(description="adapters: a folder, a list file, an object-store prefix or a place on the Hub (docs/hub.md)")
    exclude: tuple[str, ...] = Field((), description="adapters of the pool to leave out: ids, with the wildcards of a shell")
    checkpoints: Literal["leave_out", "include"] = Field(
        "leave_out", description="checkpoint-NNN folders in that of an adapter of the pool, or beside one called final"
    )
    target: TargetConfig
    search: SearchConfig = SearchConfig()
    merge: MergeConfig = MergeConfig()
    train: TrainConfig = TrainConfig()
    compare: CompareConfig = CompareConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def nothing_is_written_into_the_pool(self) -> "Config":
        for name, path in {"run": self.run, "search.store": self.search.store}.items():
            if path and lies_in(path, self.pool):
                raise ValueError(f"{name}: {path} lies in the pool {self.pool}, which it would change; choose another folder")
        return self

    @model_validator(mode="after")
    def nothing_is_read_that_a_run_replaces(self) -> "Config":
        data = {f"target.{role}": path for role, path in self.target.paths.items()}
        base = self.base if Path(self.base).is_dir() else None
        for name, path in {"pool": self.pool, "base": base, **data}.items():
            if path and lies_in(path, self.run):
                raise ValueError(f"{name}: {path} lies in the run folder {self.run}, where files are replaced; keep them apart")
        return self

    @model_validator(mode="after")
    def a_probe_trains_on_one_device(self) -> "Config":
        if self.merge.probe and self.train.shard:
            raise ValueError("merge.probe trains on one device, train.shard is for bases that fit none; leave one out")
        return self

    @model_validator(mode="after")
    def a_hedge_trains_one_model(self) -> "Config":
        if self.compare.mode == "hedge" and len(self.train.seeds) > 1:
            raise ValueError("compare.mode hedge is for one good model, several train.seeds are for a study; give one seed")
        if self.compare.mode == "hedge" and self.train.steps < 3:
            raise ValueError(
                f"compare.mode hedge decides after a third of train.steps, which are {self.train.steps}; use 3 or more"
            )
        return self

    @model_validator(mode="after")
    def rivals_train_an_adapter_on_one_device(self) -> "Config":
        rivals = [init for init in self.compare.inits if init in RIVALS]
        if self.train.quantize != "none" and (moved := [init for init in rivals if init in MOVED]):
            raise ValueError(
                f"compare.inits: {moved[0]} takes a part of the base's weights, which train.quantize has in 4 bits; leave one out"
            )
        if rivals and (self.train.method == "full" or self.train.shard):
            raise ValueError(
                f"compare.inits: {rivals[0]} begins a fresh adapter from a base that one device holds; leave it out, or "
                "train.method: full and train.shard"
            )
        return self

    @model_validator(mode="after")
    def answers_are_generated_on_one_device(self) -> "Config":
        if self.train.shard and self.compare.metric not in (None, *BY_CHOICES):
            raise ValueError(
                f"compare.metric {self.compare.metric} has answers written on one device, train.shard is for bases that fit "
                f"none; use {' or '.join(BY_CHOICES)}, or leave one out"
            )
        return self

    @field_validator("base")
    @classmethod
    def local_folder_absolute(cls, value: str) -> str:
        """Workers run in other folders than the command."""
        path = Path(os.path.expanduser(value))
        return str(path.resolve()) if path.is_dir() else value


def load_config(path: str, settings: Sequence[str] = (), **overrides: Any) -> Config:
    """Read a config file. `settings` (as of `with_settings`) replace values of it, and top-level keys in `overrides` that are not
    None.

    Raises:
        InputError: no such file, not YAML, or a key or value that is not right.
    """
    content = with_settings(read_yaml(path, "run, base, pool and target"), settings)
    return build_config({**content, **{key: value for key, value in overrides.items() if value is not None}}, path)


def build_config(content: dict[str, Any], source: str) -> Config:
    """Validate `content`; `source` names it in messages.

    Raises:
        InputError: a key or value that is not right, named with where it stands.
    """
    return checked(Config, content, source)
