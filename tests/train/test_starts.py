"""What an arm is known by: the weights that it starts from, and the rows that it trains on."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import CompareConfig, Config, TargetConfig
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.core.tables import SAMPLES
from pipeline.run_folder import Run
from pipeline.train.arm import Arm, Lora
from pipeline.train.starts import decided_at, make_jobs, usual_shape

LORA = Lora(4, 8.0, ("q_proj",))


@pytest.fixture
def run(tiny_base: str, make_adapter: Callable[..., Path], tmp_path: Path) -> Run:
    run = Run(Config(run=str(tmp_path), base=tiny_base, pool="pool", target=TargetConfig(train="train.jsonl")))
    make_adapter(tmp_path / "mashup", tiny_base)
    write_data(run, "a")
    return run


def write_data(run: Run, train_id: str, test_id: str = "c") -> None:
    for split, sample_id in {"train": train_id, "validation": "b", "test": test_id}.items():
        row = {"sample_id": sample_id, "split": split, "input_ids": [1], "completion_mask": [True], "learn_mask": [True]}
        run.folder.write_table(f"data/{split}.parquet", pa.Table.from_pylist([row], schema=SAMPLES))


def names(run: Run) -> list[str]:
    return [job.name for job in make_jobs(run, [Arm(init, 1e-4, 0) for init in ("base", "mashup")], LORA)]


def test_an_arm_is_known_by_the_weights_that_it_starts_from(run: Run, tmp_path: Path) -> None:
    """Not by the order of a list in the adapter's config, which differs from one process to the next."""
    base, mashup = names(run)
    file = tmp_path / "mashup" / CONFIG_FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"target_modules": content["target_modules"][::-1]}))
    assert names(run) == [base, mashup]
    weights = tmp_path / "mashup" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert names(run)[0] == base
    assert names(run)[1] != mashup


def test_an_arm_is_known_by_the_rows_that_it_trains_on(run: Run) -> None:
    """Not by the file that they were read from, nor by what it is tested on in the end."""
    before = names(run)
    write_data(run, "a", test_id="another")
    assert names(run) == before
    write_data(run, "other")
    assert not set(names(run)) & set(before)


def test_a_hedge_is_between_base_and_mashup_and_has_arms_of_its_own(run: Run) -> None:
    """What it stopped must not pass for the arm of a study that went to its end."""
    before = names(run)
    arms = [Arm(init, 1e-4, 0) for init in ("base", "mashup")]
    assert decided_at(run.config, arms) is None
    run.config = run.config.model_copy(update={"compare": CompareConfig(mode="hedge")})
    assert decided_at(run.config, arms) == 33  # of 100 steps
    assert decided_at(run.config, arms[:1]) is None  # no donor beats the base
    assert not set(names(run)) & set(before)


def test_without_a_mashup_arms_have_the_layers_of_text_that_most_adapters_adapt(tiny_base: str, seeing_base: str) -> None:
    catalogue = pa.table({"rank": [4, 4, 8], "alpha": [8.0, 8.0, 8.0], "target_modules": [["q_proj"], ["q_proj"], ["k_proj"]]})
    assert usual_shape(tiny_base, catalogue, 4) == Lora(4, 8.0, ("q_proj",))
    named = tuple(f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
    assert usual_shape(seeing_base, catalogue, 4).target_modules == named
