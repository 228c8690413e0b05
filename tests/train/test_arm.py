"""An arm's names, and what of its checkpoints goes where."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from pipeline.config import TrainConfig
from pipeline.core.storage import Folder
from pipeline.train.arm import CURVE_FILE, STATE, Job, copy_weights, download_model, keep_best, pass_tokens, row_ids, rows_digest


def test_an_arm_is_named_by_its_start_its_rate_and_its_seed_and_a_job_by_its_key_too(job: Callable[..., Job]) -> None:
    made = job("abc")
    assert (made.arm.name, made.name, made.trace) == (
        "base-lr0.01-seed0",
        "base-lr0.01-seed0-abc",
        "base-lr0.01-seed0-abc.json.gz",
    )


def test_what_only_training_needs_of_a_checkpoint_stays_there(tmp_path: Path) -> None:
    checkpoint, target = Folder.at(tmp_path / "checkpoint"), Folder.at(tmp_path / "target")
    weights = ["adapter_config.json", "adapter_model.safetensors"]
    for name in [*weights, CURVE_FILE, "README.md", f"{STATE}-0.pt", f"{STATE}-1.pt"]:
        checkpoint.write_text(name, name)
    copy_weights(checkpoint, target)
    assert sorted(target.list_files()) == weights
    (tmp_path / "local").mkdir()
    download_model(checkpoint, tmp_path / "local")
    assert sorted(path.name for path in (tmp_path / "local").iterdir()) == sorted([*weights, CURVE_FILE, "README.md"])


def test_tokens_a_pass_are_those_of_the_config_or_of_the_device() -> None:
    assert [pass_tokens(TrainConfig(tokens_per_pass=100), gpu) for gpu in (False, True)] == [100, 100]
    assert pass_tokens(TrainConfig(), gpu=False) < pass_tokens(TrainConfig(), gpu=True)


def test_rows_are_known_in_their_order(data: Folder) -> None:
    assert row_ids(data, "validation") == [str(number) for number in range(8)]


def test_the_digest_of_rows_is_of_their_contents_in_order_and_not_of_their_files(tmp_path: Path) -> None:
    folder, rows = Folder.at(tmp_path), pa.table({"sample_id": ["a", "b", "c", "d"]})
    folder.write_table("whole.parquet", rows)
    for number in range(2):
        folder.write_table(f"parts.parquet/{number}.parquet", rows.slice(2 * number, 2), row_group_rows=1)
    folder.write_table("other.parquet", rows.take([0, 2, 1, 3]))
    whole, parts, other = (rows_digest(folder, name) for name in ("whole", "parts", "other"))
    assert whole == parts != other


def test_of_an_arm_at_its_end_the_best_weights_stay(tmp_path: Path) -> None:
    arm = Folder.at(tmp_path / "arm")
    for checkpoint in ("checkpoint_1", "checkpoint_2"):
        for name in ("adapter_model.safetensors", CURVE_FILE, f"{STATE}-0.pt"):
            arm.write_text(f"{checkpoint}/{name}", name)
    arm.write_text("result.json", "{}")
    keep_best(Folder.at(tmp_path), "arm/checkpoint_1")
    left = sorted(info.path.removeprefix(f"{arm.path}/") for info in arm.walk())
    assert left == ["checkpoint_1/adapter_model.safetensors", f"checkpoint_1/{CURVE_FILE}", "result.json"]
