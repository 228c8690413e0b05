"""The fast engine against the oracle, in an actor with the environment that the search gives its actors."""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig

from pipeline.core.errors import InputError
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.tables import SCORES
from pipeline.engines.scorer import Candidate, EngineConfig, Loaded
from pipeline.engines.transformers import TransformersScorer

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install '.[cpu]'"),
    pytest.mark.xdist_group("vllm"),  # one engine for all
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine's temporary files are."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def engine(ray_session: None, engine_config: EngineConfig, scratch: Path) -> Iterator[Callable[..., Any]]:
    """engine(method, *arguments): one for the whole module, as its start takes some 15 s."""
    import ray

    from pipeline.cluster.resources import Resources, worker_env
    from pipeline.engines.scorer import build_scorer

    class Engine:
        def __init__(self, config: EngineConfig):
            tempfile.tempdir = str(scratch)
            self.scorer: Any = build_scorer("vllm", config)

        def score(self, candidates: list[Candidate], samples: pa.Table) -> pa.Table:
            return self.scorer.score(candidates, samples)

        def loaded(self) -> int:
            """Adapters in vLLM's memory."""
            return len(self.scorer.llm.llm_engine.list_loras())

        def read(self) -> Loaded:
            """Adapters that it has read so far."""
            return self.scorer.loaded

        def load_ahead(self, candidates: list[Candidate]) -> None:
            for candidate in candidates:
                self.scorer.load_ahead(candidate)

        def let_go_first(self, folders: list[Path]) -> None:
            self.scorer.let_go_first(folders)

        def holds(self) -> set[Path]:
            return set(self.scorer.adapters._held)

        def fail_in_next_step(self) -> None:
            engine = self.scorer.llm.llm_engine

            def fail() -> None:
                del engine.step
                raise RuntimeError("this step fails")

            engine.step = fail

        def limit(self, size: int) -> None:
            """Of what it keeps beside a batch, in bytes."""
            self.scorer.adapters.kept_bytes = size

        def wrapper(self) -> str:
            """The code that multiplies by A and B."""
            from vllm.platforms import current_platform

            return current_platform.get_punica_wrapper()

    resources = Resources(cpus=1, gpus=0, threads=2)
    actor = ray.remote(Engine).options(num_cpus=1, runtime_env=worker_env(resources)).remote(engine_config)
    yield lambda method, *work: ray.get(getattr(actor, method).remote(*work), timeout=240)
    ray.kill(actor)


@pytest.fixture
def vllm_score(engine: Callable[..., Any]) -> Callable[..., pa.Table]:
    """vllm_score(candidates, samples)."""
    return partial(engine, "score")


def assert_alike(found: pa.Table, expected: pa.Table) -> None:
    """Equal rows in any order, the losses within 1e-3 a token."""
    assert found.schema == SCORES
    keys = [("adapter_id", "ascending"), ("sample_id", "ascending")]
    for row, wanted in zip(found.sort_by(keys).to_pylist(), expected.sort_by(keys).to_pylist(), strict=True):
        close = pytest.approx(wanted["nll_sum"], abs=1e-3 * wanted["n_tokens"])
        assert row == {**wanted, "nll_sum": close}


def test_scores_are_those_of_the_oracle(
    vllm_score: Callable[..., pa.Table], engine_config: EngineConfig, candidates: list[Candidate], samples: pa.Table
) -> None:
    """In batches of two, so that adapters share a batch with each other and with the base, and push each other out."""
    oracle = TransformersScorer(engine_config)
    for start in (0, 1, 3, 0):
        batch = candidates[start : start + 2]
        assert_alike(vllm_score(batch, samples), oracle.score(batch, samples))


def test_an_adapter_that_cannot_be_loaded_leaves_the_engine_working(
    vllm_score: Callable[..., pa.Table],
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    weights = make_adapter(tmp_path, tiny_base) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match="corrupt weights"):
        vllm_score([candidates[1], Candidate("broken", tmp_path)], samples)
    assert_alike(vllm_score(candidates[:2], samples), TransformersScorer(engine_config).score(candidates[:2], samples))


def test_a_step_that_fails_leaves_nothing_to_the_next_batch(
    engine: Callable[..., Any],
    vllm_score: Callable[..., pa.Table],
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
) -> None:
    engine("fail_in_next_step")
    with pytest.raises(Exception, match="this step fails"):
        vllm_score(candidates[1:3], samples)
    assert_alike(vllm_score(candidates[2:4], samples), TransformersScorer(engine_config).score(candidates[2:4], samples))


def test_a_name_that_comes_again_for_another_adapter_is_another_adapter(
    vllm_score: Callable[..., pa.Table], engine_config: EngineConfig, candidates: list[Candidate], samples: pa.Table
) -> None:
    """An engine serves several races, each with names of its own."""
    for other in candidates[1:3]:
        batch = [Candidate("exact-1", other.folder)]
        assert_alike(vllm_score(batch, samples), TransformersScorer(engine_config).score(batch, samples))


def test_further_samples_of_a_known_adapter(
    vllm_score: Callable[..., pa.Table], engine_config: EngineConfig, candidates: list[Candidate], samples: pa.Table
) -> None:
    parts = [vllm_score(candidates[1:3], part) for part in (samples.slice(0, 5), samples.slice(5))]
    assert_alike(pa.concat_tables(parts), TransformersScorer(engine_config).score(candidates[1:3], samples))


def test_adapters_leave_nothing_behind(
    engine: Callable[..., Any],
    candidates: list[Candidate],
    samples: pa.Table,
    engine_config: EngineConfig,
    scratch: Path,
    tmp_path: Path,
) -> None:
    """In vLLM's memory no more than may be kept; of those that are rewritten for it, nothing on disk."""
    for start in (1, 3):
        engine("score", candidates[start : start + 2], samples.slice(0, 2))
    assert engine("loaded") == len(candidates) - 1
    engine("limit", 1)
    shutil.copytree(str(candidates[1].folder), tmp_path / "another")
    engine("score", [candidates[2], Candidate("another", tmp_path / "another")], samples.slice(0, 2))
    assert engine("loaded") == engine_config.adapters_per_batch
    engine("limit", 1 << 30)
    assert not list(scratch.glob("mashup-plain-*"))


def test_an_adapter_is_read_once_while_it_is_held(
    engine: Callable[..., Any],
    vllm_score: Callable[..., pa.Table],
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    mine = Candidate("mine", make_adapter(tmp_path / "mine", tiny_base, seed=5, std=0.3))
    expected = TransformersScorer(engine_config).score([mine], samples)
    parts = [vllm_score([mine], samples.slice(0, 5))]
    shutil.rmtree(tmp_path / "mine")
    parts.append(vllm_score([candidates[1], mine], samples.slice(5)).slice(len(samples) - 5))
    assert_alike(pa.concat_tables(parts), expected)
    engine("limit", 1)
    shutil.copytree(str(candidates[2].folder), tmp_path / "another")
    vllm_score([candidates[1], Candidate("another", tmp_path / "another")], samples.slice(0, 1))
    engine("limit", 1 << 30)
    with pytest.raises(Exception, match=r"adapter_config\.json is missing"):
        vllm_score([mine], samples)


def test_an_adapter_that_was_read_ahead_is_not_read_again_where_it_is_scored(
    engine: Callable[..., Any],
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    """One of those that are read ahead cannot be, which is said where it is scored."""
    mine = Candidate("mine", make_adapter(tmp_path / "mine", tiny_base, seed=6, std=0.3))
    missing = Candidate("missing", tmp_path / "missing")
    expected = TransformersScorer(engine_config).score([mine], samples)
    before = engine("read").adapters
    engine("load_ahead", [mine, mine, missing, Candidate("base", None)])
    assert engine("read").adapters == before + 1
    shutil.rmtree(tmp_path / "mine")
    assert_alike(engine("score", [mine, candidates[1]], samples).slice(0, len(samples)), expected)
    with pytest.raises(Exception, match=r"adapter_config\.json is missing"):
        engine("score", [missing], samples)


def test_those_that_are_done_with_make_room_first_then_those_with_the_highest_loss(
    engine: Callable[..., Any],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    made = [Candidate(str(n), make_adapter(tmp_path / str(n), tiny_base, seed=20 + n, std=0.3)) for n in range(6)]
    size = made[0].folder.joinpath("adapter_model.safetensors").stat().st_size  # type: ignore[union-attr]
    engine("limit", 1)
    engine("score", made[:2], samples)  # what was held before is gone
    engine("limit", 4 * size + size // 2)
    scores = pa.concat_tables([engine("score", made[n : n + 2], samples) for n in (0, 2)])
    losses = {str(n): sum(row["nll_sum"] for row in scores.to_pylist() if row["adapter_id"] == str(n)) for n in range(4)}
    worst = max((n for n in range(1, 4)), key=lambda n: losses[str(n)])
    engine("let_go_first", [made[0].folder])
    engine("score", [made[4]], samples)
    assert engine("holds") == {made[n].folder for n in (1, 2, 3, 4)}
    engine("score", [made[5]], samples)
    gone = {made[n].folder for n in (1, 2, 3, 4)} - engine("holds")
    assert gone <= {made[worst].folder, made[4].folder}
    assert len(gone) == 1
    engine("limit", 1 << 30)


def test_an_adapter_that_vllm_refuses_leaves_the_engine_working(
    vllm_score: Callable[..., pa.Table],
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    large = Candidate("large", make_adapter(tmp_path, tiny_base, rank=32))
    with pytest.raises(Exception, match="rank"):
        vllm_score([candidates[1], large], samples)
    assert_alike(vllm_score(candidates[1:3], samples), TransformersScorer(engine_config).score(candidates[1:3], samples))


def test_an_adapter_that_blows_up_bends_no_other_score(
    vllm_score: Callable[..., pa.Table],
    engine_config: EngineConfig,
    candidates: list[Candidate],
    samples: pa.Table,
    tiny_base: str,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
) -> None:
    """Its losses are no numbers; those beside it in a batch, and those after it in the same memory, are what they were."""
    wild = Candidate("wild", make_adapter(tmp_path, tiny_base, std=1e30, targets=["q_proj", "v_proj", "o_proj", "down_proj"]))
    expected = TransformersScorer(engine_config).score([candidates[1]], samples)
    vllm_score([wild], samples)
    assert_alike(vllm_score([candidates[1]], samples), expected)
    together = vllm_score([wild, candidates[1]], samples)
    assert_alike(together.slice(len(samples)), expected)
    assert not np.isfinite(together["nll_sum"].to_numpy()[: len(samples)]).any()
    assert_alike(vllm_score([candidates[1]], samples), expected)


def test_the_plugin_is_at_work(engine: Callable[..., Any]) -> None:
    import vllm

    from pipeline.engines.vllm_cpu_lora import KNOWN, current_platform

    expected = current_platform.is_cpu() and vllm.__version__.startswith(KNOWN)
    assert engine("wrapper").endswith("vllm_cpu_lora.SegmentedLora") == expected


def test_it_says_what_reading_adapters_took_and_reads_none_that_it_holds(
    engine: Callable[..., Any],
    vllm_score: Callable[..., pa.Table],
    candidates: list[Candidate],
    samples: pa.Table,
    tmp_path: Path,
) -> None:
    assert candidates[1].folder
    copy = Candidate("copy", Path(shutil.copytree(candidates[1].folder, tmp_path / "copy")))
    before = engine("read")
    vllm_score([copy], samples)
    vllm_score([copy], samples)
    read = engine("read").since(before)
    assert (read.adapters, read.bytes, read.seconds > 0) == (1, (tmp_path / "copy" / WEIGHTS_FILE).stat().st_size, True)


def test_what_the_environment_says_of_vllm_are_words_that_it_knows() -> None:
    from vllm.envs import environment_variables

    from pipeline.cluster.resources import CARRIED, Resources, worker_env

    said = {*CARRIED, *worker_env(Resources(1, 0, 2))["env_vars"]}
    assert {name for name in said if name.startswith("VLLM_")} - environment_variables.keys() == set()


@pytest.mark.parametrize(("invariant", "overrides"), [("0", {"head_dtype": "float32"}), ("1", None)])
def test_logits_are_float32_on_gpus_and_there_is_room_for_them(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch, invariant: str, overrides: dict[str, str] | None
) -> None:
    from pipeline.engines import vllm

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", invariant)
    assert not {"hf_overrides", "gpu_memory_utilization"} & vllm._arguments(engine_config).keys()
    monkeypatch.setattr(type(vllm.current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(vllm.current_platform), "get_device_total_memory", lambda self: 48_000_000)
    given = vllm._arguments(engine_config)
    assert given.get("hf_overrides") == overrides
    assert given["gpu_memory_utilization"] == pytest.approx(0.92 - 3 * 1024 * 400 * 4 / 48_000_000, abs=0.001)


def test_logits_are_float32_where_the_language_model_is_a_part(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipeline.engines import vllm

    AutoConfig.for_model("gemma3").save_pretrained(tmp_path)
    monkeypatch.setattr(type(vllm.current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(vllm.current_platform), "get_device_total_memory", lambda self: 1 << 40)
    asked = {"head_dtype": "float32"}
    assert vllm._arguments(replace(engine_config, base=str(tmp_path)))["hf_overrides"] == asked | {"text_config": asked}


def test_a_base_of_a_class_that_vllm_does_not_know_is_refused_with_the_way_out(
    engine_config: EngineConfig, tiny_base: str, tmp_path: Path
) -> None:
    from pipeline.engines.vllm import VllmScorer

    config = json.loads((Path(tiny_base) / "config.json").read_text()) | {"architectures": ["NobodysForCausalLM"]}
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    said = rf"^{base}: vLLM cannot serve a NobodysForCausalLM \(.{{,80}}\); set search.engine: transformers$"
    with pytest.raises(InputError, match=said):
        VllmScorer(replace(engine_config, base=str(base)))


def _needs_more() -> Any:
    raise ModuleNotFoundError("No module named 'torchvision'")


@pytest.mark.parametrize(
    ("load", "max_rank", "reason"),
    [
        (_needs_more, 0, "No module named 'torchvision'"),
        (lambda: torch.nn.Module, 8, "it takes no adapters there"),
        (lambda: torch.nn.Module, 0, None),
    ],
)
def test_why_vllm_cannot_serve_a_class_is_told_from_what_may_pass(
    engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any], max_rank: int, reason: str | None
) -> None:
    from pipeline.engines import vllm

    def fail(**_: Any) -> None:
        raise ValueError("Free memory on device is less than desired")

    monkeypatch.setattr(vllm, "LLM", fail)
    monkeypatch.setitem(vllm.ModelRegistry.models, "LlamaForCausalLM", SimpleNamespace(load_model_cls=load))
    said = rf"vLLM cannot serve a LlamaForCausalLM \({reason}\); set search" if reason else "Free memory"
    with pytest.raises(InputError if reason else ValueError, match=said):
        vllm.VllmScorer(replace(engine_config, max_rank=max_rank))
