"""The GPU check without a GPU: how checks are run, that each can fail, and stage A at its smallest."""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import exact, speed, whole_run
from benchmarks.gpu.__main__ import run_stage
from benchmarks.gpu.checks import FAILED, OK, RUNNING, SKIPPED, Results, Setting, SkippedError, WrongError, run_checks, within
from pipeline.adapters.low_rank import Factors
from pipeline.train.loop import Finetuning

CRASHING = """
import os, sys
from pathlib import Path
from benchmarks.gpu.checks import Results, Setting, run_checks

def first(setting): return {"figure": 1.0}
def second(setting): os._exit(9)
def third(setting): return {}

results = Results(Path(sys.argv[1]))
usable = lambda: True
sys.exit(not run_checks("X", [first, second, third], Setting("cpu", Path()), results, float(sys.argv[2]), usable))
"""


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", tmp_path)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "gpu.json")


def soon() -> float:
    return time.time() + 60


def on_disk(results: Results) -> dict[str, str]:
    """Check -> status, as the file has it."""
    return {check["check"]: check["status"] for check in json.loads(results.path.read_text())["checks"]}


def test_a_check_that_fails_or_has_nothing_to_do_leaves_the_others_going(
    setting: Setting, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(setting: Setting) -> dict[str, Any]:
        return {"tokens_s": 1234.5678}

    def raises(setting: Setting) -> dict[str, Any]:
        raise RuntimeError("CUDA error\nand a long story")

    def wrong(setting: Setting) -> dict[str, Any]:
        return within({"nll": 0.5, "other": 0.0}, {"nll": 0.1, "other": 0.1})

    def nan(setting: Setting) -> dict[str, Any]:
        return within({"nll": float("nan")}, {"nll": 0.1})

    def nothing(setting: Setting) -> dict[str, Any]:
        raise SkippedError("a CPU has none")

    assert run_checks("A", [raises, wrong, nan, nothing, good], setting, results, soon(), lambda: True)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("A raises: FAILED: RuntimeError: CUDA error, ")
    assert told[1].startswith("A wrong: FAILED: nll 0.5 is above 0.1, nll 0.5, other 0, ")
    assert told[2].startswith("A nan: FAILED: nll nan is above 0.1")
    assert told[3].startswith("A nothing: skipped: a CPU has none, ")
    assert told[4].startswith("A good: ok, tokens_s 1235, ")
    assert "NaN" not in results.path.read_text()
    assert list(on_disk(results).values()) == [FAILED, FAILED, FAILED, SKIPPED, OK]


def test_the_file_has_each_check_before_the_next_one_ends(setting: Setting, results: Results) -> None:
    seen = []

    def first(setting: Setting) -> dict[str, Any]:
        seen.append(on_disk(results))
        return {}

    def second(setting: Setting) -> dict[str, Any]:
        seen.append(on_disk(results))
        return {}

    run_checks("A", [first, second], setting, results, soon(), lambda: True)
    assert seen == [{"first": RUNNING}, {"first": OK, "second": RUNNING}]
    assert Results(results.path).records == results.records


def test_what_would_begin_after_the_time_of_its_stage_is_skipped(setting: Setting, results: Results) -> None:
    ran = []

    def slow(setting: Setting) -> dict[str, Any]:
        time.sleep(0.3)
        return {}

    def late(setting: Setting) -> dict[str, Any]:
        ran.append("late")
        return {}

    assert run_checks("A", [slow, late], setting, results, time.time() + 0.2, lambda: True)
    assert on_disk(results) == {"slow": OK, "late": SKIPPED}
    assert not ran


def test_a_device_that_no_longer_works_leaves_the_other_checks_to_a_fresh_process(setting: Setting, results: Results) -> None:
    ran = []

    def breaks(setting: Setting) -> dict[str, Any]:
        ran.append("breaks")
        raise RuntimeError("an illegal memory access was encountered")

    def after(setting: Setting) -> dict[str, Any]:
        ran.append("after")
        return {}

    assert not run_checks("A", [breaks, after], setting, results, soon(), lambda: False)
    assert run_checks("A", [breaks, after], setting, Results(results.path), soon(), lambda: True)
    assert ran == ["breaks", "after"]


def test_a_check_that_ends_its_process_fails_and_the_next_one_runs(results: Results, tmp_path: Path) -> None:
    results.tell(device="cpu")
    run_stage("X", [sys.executable, "-c", CRASHING, str(results.path)], results, "cpu", seconds=60)
    assert on_disk(results) == {"first": OK, "second": FAILED, "third": OK}
    assert next(record for record in results.records if record.check == "second").why == "its process ended with exit code 9"


def test_a_stage_that_hangs_is_stopped_and_one_that_cannot_start_has_failed(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.GRACE", 0)
    results.tell(device="cpu")
    started = time.monotonic()
    run_stage("X", [sys.executable, "-c", "import time; time.sleep(100)"], results, "cpu", seconds=1)
    assert time.monotonic() - started < 30
    run_stage("Y", [sys.executable, "-c", "raise SystemExit(3)"], results, "cpu", seconds=60)
    whys = {record.stage: record.why for record in results.records}
    assert results.count(FAILED) == 2
    assert "stopped" in str(whys["X"])
    assert whys["Y"] == "its process ended with exit code 3"


def test_stage_a_holds_on_a_cpu_without_ray_and_vllm_and_stage_b_says_what_it_lacks(tmp_path: Path) -> None:
    for name in ("ray", "vllm"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--stages", "AB", "--out", str(tmp_path / "gpu.json")]
    paths = [str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "gpu.json").read_text())
    checks = {(check["stage"], check["check"]): check for check in found["checks"]}
    assert [name for stage, name in checks if stage == "A"] == [check.__name__ for check in (*exact.CHECKS, *speed.CHECKS)]
    assert {(stage, check["status"]) for (stage, _), check in checks.items()} == {("A", OK), ("B", SKIPPED)}, done.stdout
    assert found["about"]["failed"] == 0
    assert "no ray here" in checks["B", "all"]["why"]
    assert done.returncode == 0


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--stages", "A", "--out", str(tmp_path / "gpu.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "A device: FAILED: torch finds no CUDA device" in done.stdout


@pytest.fixture
def one_thread() -> Any:
    """At these sizes more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("check", [exact.completions_float32, exact.completions_bfloat16])
def test_a_loss_that_is_wrong_is_found(
    check: Callable[..., Any], setting: Setting, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    right = exact.completion_nll
    monkeypatch.setattr(exact, "completion_nll", lambda model, batch: right(model, batch) * 1.05)
    with pytest.raises(WrongError, match=r"whole_nll .* is above .*shared_gradient"):
        check(setting)


def test_a_beginning_that_is_not_shared_is_found(setting: Setting, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    right = exact.completion_nll
    monkeypatch.setattr(exact, "completion_nll", lambda model, batch: right(model, replace(batch, n_shared=0)))
    with pytest.raises(WrongError, match="took 1 passes of the model, not 2"):
        exact.completions_float32(setting)


@pytest.mark.parametrize("check", [exact.fused_lora_float32, exact.fused_lora_bfloat16])
def test_a_fused_layer_that_is_wrong_is_found(
    check: Callable[..., Any], setting: Setting, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from pipeline.train.fused_lora import _Product

    backward = _Product.backward

    def wrong(ctx: Any, gradient: Any) -> Any:
        to_x, *none, to_a, to_b, last = backward(ctx, gradient)
        return (to_x, *none, to_a, to_b * 2, last)

    monkeypatch.setattr(_Product, "backward", staticmethod(wrong))
    with pytest.raises(WrongError, match=r"fused_gradient .* is above"):
        check(setting)
    monkeypatch.setattr(exact, "fuse", lambda model: None)
    with pytest.raises(WrongError, match="0 of 14 layers are fused"):
        check(setting)


@pytest.mark.parametrize("check", [exact.resumed_adapter, exact.resumed_all_weights])
def test_a_checkpoint_without_moments_is_found(
    check: Callable[..., Any], setting: Setting, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    right = Finetuning.restore

    def forgets(finetuning: Finetuning, folder: Path) -> None:
        right(finetuning, folder)
        finetuning.optimizer.state.clear()

    monkeypatch.setattr(Finetuning, "restore", forgets)
    with pytest.raises(WrongError, match=r"curve .* is above 0\.0001"):
        check(setting)


def test_a_sharded_run_that_trains_otherwise_is_found(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    nothing = SimpleNamespace(init_process_group=lambda *given, **named: None, destroy_process_group=lambda: None)
    job = exact._job(setting, "lora")
    slower = replace(job, arm=replace(job.arm, lr=job.arm.lr * 0.9))
    monkeypatch.setattr(exact, "dist", nothing)
    monkeypatch.setattr(exact, "_job", lambda setting, method, shard=False: slower if shard else job)
    with pytest.raises(WrongError, match=r"curve .* is above"):
        exact.one_worker_sharded(setting)


def test_a_merge_that_the_device_cuts_otherwise_is_found(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = speed.truncate, list[int]()

    def differs(delta: Factors, rank: int) -> Any:
        calls.append(rank)
        cut, kept = right(delta, rank)
        return (Factors(cut.a_RI * 1.01, cut.b_OR), kept) if len(calls) == 2 else (cut, kept)

    monkeypatch.setattr(speed, "truncate", differs)
    with pytest.raises(WrongError, match=r"k_proj_difference .* is above"):
        speed.truncation(setting)


def test_an_adapter_that_does_not_arrive_is_found(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    read = speed._ahead
    monkeypatch.setattr(speed, "_ahead", lambda files, pinned: read(files[:-1], pinned))
    with pytest.raises(WrongError, match=r"1 tensors did not arrive, 0\.q_proj\.A"):
        speed.adapters_to_the_device(setting)


def test_a_pass_that_fits_no_memory_is_said_and_the_smallest_must_fit(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    def no_room_for(most: int) -> Callable[..., Any]:
        def loss(adapted: Any, batch: Any) -> Any:
            if batch.ids_BT.numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return adapted(input_ids=batch.ids_BT, labels=batch.ids_BT).loss

        return loss

    monkeypatch.setattr(speed, "_our_loss", no_room_for(64))
    monkeypatch.setattr(speed, "_transformers_loss", no_room_for(64))
    figures = speed.training_pass_8b(setting)
    assert figures["ours_128_result"] == figures["plain_256_result"] == "out_of_memory"
    assert figures["ours_64_tokens_s"] > 0
    monkeypatch.setattr(speed, "_our_loss", no_room_for(0))
    with pytest.raises(WrongError, match="not even 64 tokens fit"):
        speed.training_pass_8b(setting)


def test_kernels_that_run_at_once_count_once(tmp_path: Path) -> None:
    spans = [("kernel", 0, 100), ("kernel", 50, 100), ("gpu_memcpy", 60, 10), ("kernel", 1000, 5), ("cpu_op", 0, 5000)]
    events = [{"cat": kind, "ts": start, "dur": length} for kind, start, length in spans]
    (tmp_path / "trace").write_bytes(gzip.compress(json.dumps({"traceEvents": [*events, {"name": "metadata"}]}).encode()))
    assert speed.busy_seconds(tmp_path / "trace", speed.KERNELS["cuda"]) == pytest.approx(155e-6)


@pytest.mark.parametrize(("after", "why"), [([6.0e9, 1.5e9], None), ([6.0e9], "4.50 GB are left"), ([2.5e9], "1.00 GB are left")])
def test_memory_that_a_task_leaves_is_found(
    after: list[float], why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a task may take a moment to end."""
    seen = [1.5e9, *after]
    monkeypatch.setattr(whole_run, "PATIENCE", 1.2)
    monkeypatch.setattr(whole_run, "device_memory", lambda: seen.pop(0) if len(seen) > 1 else seen[0])
    monkeypatch.setattr(whole_run, "connect", lambda: 0.0)
    monkeypatch.setattr(whole_run, "compute_task", lambda function: SimpleNamespace(remote=lambda size: 1.5e9 + size))
    monkeypatch.setattr(whole_run.ray, "get", lambda value: value)
    if why is None:
        assert whole_run.memory_after_a_task(Setting("cuda", tmp_path))["left_gb"] == 0
    else:
        with pytest.raises(WrongError, match=why):
            whole_run.memory_after_a_task(Setting("cuda", tmp_path))
    with pytest.raises(SkippedError):
        whole_run.memory_after_a_task(Setting("cpu", tmp_path))
