"""The whole page on a tiny model: end to end, stage by stage, and with no donor that helps. Faults: tests/test_disturbed.py."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import Command
from nodes import kill
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.run import run_search
from pipeline.run_folder import Run

EMBEDDING = "base_model.model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def pool(
    write_pool: Callable[[Path], Path],
    write_jsonl: Any,
    word_rows: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two donors that were trained on the target's kind of task, one of which says on what; two that were not, and one that is
    set aside."""
    folder = write_pool(tmp_path_factory.mktemp("pool"))
    card = "---\ndatasets: [data.jsonl, elsewhere/corpus]\nlicense: mit\n---\n"
    (folder / "related/1/README.md").write_text(card)
    rows = [*word_rows[:40], {"prompt": "Something else", "completion": "altogether"}]
    write_jsonl(folder / "related/1/data.jsonl", rows)
    (folder / "pickled").mkdir()
    (folder / "pickled/adapter_config.json").write_text((folder / "random/1/adapter_config.json").read_text())
    (folder / "pickled/adapter_model.bin").write_bytes(b"never opened")
    return folder


@pytest.fixture
def config(small_config: Callable[[Path, Path], dict[str, Any]], pool: Path, tmp_path: Path) -> dict[str, Any]:
    """What trains has more than half of the cluster: one after the other uses the same process, which imports torch once."""
    given = small_config(pool, tmp_path)
    return {"run": str(tmp_path / "run"), **given, "train": given["train"] | {"cpus_per_worker": 2.5}}


def mashup(*arguments: str) -> int:
    """The command, in this process. Gives its exit code."""
    before, sys.argv = sys.argv, ["mashup", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def run_config(config: dict[str, Any], tmp_path: Path) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def scores(run: Path) -> list[tuple[Any, ...]]:
    table = pads.dataset([str(file) for file in run.glob("scores/*.parquet")]).to_table()
    return sorted(tuple(row.values()) for row in table.to_pylist())


RESULTS = {
    "pipeline.adapters.index": "catalogue.parquet",
    "pipeline.data.sample": "samples.parquet",
    "pipeline.search.search": "leaderboard.parquet",
    "pipeline.merge.mashup": "selection.json",
    "pipeline.train.comparison": "comparison.parquet",
}
"""Of each stage one, by its module."""


@pytest.fixture
def before_check(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Of each stage that made sure that the run folder is still its own: whether its result was there already."""
    found, check = dict[str, bool](), Run.check

    def noted(run: Run) -> None:
        module = sys._getframe(1).f_globals["__name__"]
        if module in RESULTS:
            found[module] = run.folder.exists(RESULTS[module])
        check(run)

    monkeypatch.setattr(Run, "check", noted)
    return found


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_the_whole_page(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], before_check: dict[str, bool]
) -> None:
    """What happens to it on the way is told in tests/test_disturbed.py."""
    config |= {"merge": {"k": 2, "weights": "learned", "method": "fold"}, "compare": {"metric": "exact_match"}}
    file, run = run_config(config, tmp_path), tmp_path / "run"
    assert mashup("run", file) == 0
    told = capsys.readouterr()
    assert told.out.strip().splitlines()[-1] == f"{run}/report.html"
    assert "already done" not in told.err
    assert before_check == dict.fromkeys(RESULTS, False)
    assert not list(run.rglob("*.partial"))
    stored = pads.dataset([str(file) for file in run.glob("store/*/*.parquet")]).to_table(["adapter_hash", "sample_id"])
    pairs = [tuple(row.values()) for row in stored.to_pylist()]
    assert len(pairs) == len(set(pairs))  # no score was computed twice, those of the candidate merges among them
    _check_results(run, config["base"])

    # Again: nothing is computed.
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*.parquet")}
    assert mashup("run", file) == 0
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.parquet")} == before


def _check_results(run: Path, base: str) -> None:
    catalogue = {row["adapter_id"]: row for row in pq.read_table(run / "catalogue.parquet").to_pylist()}
    assert catalogue["pickled"]["status"] == "set_aside"
    assert len(scores(run)) == 5 * 24  # the base and four donors on every sample

    leaderboard = pq.read_table(run / "leaderboard.parquet").to_pylist()
    assert [row["adapter_id"].partition("/")[0] for row in leaderboard[:2]] == ["related", "related"]

    contamination = json.loads((run / "contamination.json").read_text())
    assert contamination.keys() == {"related/1"}
    assert re.fullmatch(
        r"its card names data.jsonl, which holds \d+ of 24 sample rows, and \d+ others nearly", contamination["related/1"][0]
    )

    selection, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("selection", "summary"))
    assert selection["verdict"] == "mashup"
    assert {donor["adapter_id"].partition("/")[0] for donor in selection["donors"]} == {"related"}
    assert {donor["adapter_id"]: donor["license"] for donor in selection["donors"]}["related/1"] == "mit"
    candidates = {candidate["name"]: candidate for candidate in selection["candidates"]}
    assert candidates.keys() == {"fold-2", "fold-2-learned"}
    learned = next(candidate for name, candidate in candidates.items() if name.endswith("-learned"))
    assert len(set(learned["weights"])) == len(learned["donors"])
    inits = summary["inits"]
    assert inits["mashup"]["validation_nll_start"] < inits["base"]["validation_nll_start"]
    assert summary["overhead_seconds"]["total"] == pytest.approx(
        sum(summary["overhead_seconds"][stage] for stage in ("index", "samples", "search", "merge"))
    )
    curves = pq.read_table(run / "comparison.parquet").to_pylist()
    assert [row["step"] for row in curves if row["init"] == "base"] == [0, 2, 4, 6]
    assert [row["step"] for row in curves if row["init"] == "mashup"] == [0, 2, 4, 6]
    rows = pq.read_table(run / "metric_rows.parquet").to_pylist()
    assert len(rows) == len(pq.read_table(run / "data/test.parquet"))
    for init in ("base", "mashup"):
        assert inits[init]["test_metric"]["mean"] == fmean(row[f"{init}_score"] for row in rows)
        assert inits[init]["test_metric"]["mean"] >= inits[init]["test_exact_match"]["mean"]  # words apart, they are the same
    assert "Exact match of written answers on the test split" in (run / "report.html").read_text()
    for folder in ("mashup", "finetuned"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / folder))
        assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    assert "base_model" in (run / "mashup/README.md").read_text()


@pytest.mark.timeout(60)
def test_a_metric_that_is_not_there_is_said_before_anything(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mashup("run", run_config(config | {"compare": {"metric": "no_such_module:f1"}}, tmp_path)) == 2
    assert capsys.readouterr().err.startswith("mashup: compare.metric: no_such_module cannot be imported")
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(60)
def test_bitsandbytes_that_is_not_there_is_said_before_anything(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.quantised_base.is_bitsandbytes_available", lambda: False)
    config["train"]["quantize"] = "nf4"
    assert mashup("run", run_config(config, tmp_path)) == 2
    assert capsys.readouterr().err == "mashup: install bitsandbytes to use train.quantize nf4: pip install '.[quantize]'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("ray_session")
def test_rows_that_the_metric_cannot_measure_end_a_run_before_the_search(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mashup("run", run_config(config | {"compare": {"metric": "choices"}}, tmp_path)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mashup: compare.metric choices: 10 of 10 rows of the test split have no `choices`")
    assert not (tmp_path / "run/scores").exists()


@pytest.mark.usefixtures("ray_session")
def test_no_donor_helps_so_the_base_is_the_start(
    config: dict[str, Any], pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only donor is a trained one turned round by a negative alpha: it takes away what the task needs."""
    shutil.copytree(pool / "related/2", tmp_path / "pool/contrary")
    file = tmp_path / "pool/contrary/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": -16}))
    config |= {"pool": str(tmp_path / "pool")}
    run_search(load_config(run_config(config, tmp_path)))
    assert mashup("merge", "--run", config["run"]) == 0
    selection = json.loads((tmp_path / "run/selection.json").read_text())
    assert (selection["verdict"], selection["donors"], selection["recipe"]) == ("base", [], None)
    assert not (tmp_path / "run/mashup").exists()
    assert "verdict: start from the base" in capsys.readouterr().err
    assert mashup("compare", "--run", config["run"]) == 0
    cost = json.loads((tmp_path / "run/summary.json").read_text())["verdict_cost"]
    stages = json.loads((tmp_path / "run/stages.json").read_text())
    assert cost["seconds"] == pytest.approx(sum(stages[stage]["seconds"] for stage in ("index", "samples", "search", "merge")))
    assert "To learn that took" in " ".join(capsys.readouterr().out.split())
    assert mashup("report", "--run", config["run"]) == 0
    assert "To learn that took" in (tmp_path / "run/report.html").read_text()


@pytest.fixture
def whole_pool(pool: Path, tiny_base: str, tmp_path: Path) -> Path:
    """The donors that were trained on the target's kind of task, one of them with an embedding of its own beside its factors."""
    for seed in (1, 2):
        shutil.copytree(pool / f"related/{seed}", tmp_path / f"whole/{seed}")
    folder, own = tmp_path / "whole/2", AutoModelForCausalLM.from_pretrained(tiny_base).model.embed_tokens.weight.detach()
    trained = own + 0.02 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    tensors = load_file(folder / WEIGHTS_FILE) | {EMBEDDING: trained}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"modules_to_save": ["embed_tokens"]}))
    return tmp_path / "whole"


def hedge_of(run: Path) -> dict[str, Any]:
    """The summary, with the steps at which each start was evaluated."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    rows = pq.read_table(run / "comparison.parquet").to_pylist()
    steps = {init: [row["step"] for row in rows if row["init"] == init] for init in ("base", "mashup")}
    return summary | {"steps": steps}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_a_donor_with_an_embedding_of_its_own(
    config: dict[str, Any], whole_pool: Path, tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is scored, merged and trained on with it; an engine that cannot score it has it set aside, with the way out."""
    run, inits = tmp_path / "run", ["mashup", "random_delta"]
    config |= {"pool": str(whole_pool), "merge": {"k": 2, "method": "exact", "weights": "equal"}, "compare": {"inits": inits}}
    assert mashup("run", run_config(config, tmp_path)) == 0
    rows = {row["adapter_id"]: row for row in pq.read_table(run / "catalogue.parquet").to_pylist()}
    assert rows["2"]["status"] == "ok"
    assert "embed_tokens beside it was trained, and is scored and merged whole" in rows["2"]["warning"]
    own = AutoModelForCausalLM.from_pretrained(tiny_base).model.embed_tokens.weight.detach()
    change = load_file(whole_pool / "2" / WEIGHTS_FILE)[EMBEDDING] - own
    selection = json.loads((run / "selection.json").read_text())
    assert {donor["adapter_id"]: donor["weight"] for donor in selection["donors"]} == {"1": 0.5, "2": 0.5}
    assert selection["whole_layers"] == ["model.embed_tokens"]
    assert "Layers that it replaces whole: model.embed_tokens" in (run / "mashup/README.md").read_text()
    merged = load_file(run / "mashup" / WEIGHTS_FILE)[EMBEDDING]
    torch.testing.assert_close(merged, own + 0.5 * change, atol=1e-6, rtol=0)
    assert json.loads((run / "mashup" / CONFIG_FILE).read_text())["modules_to_save"] == ["model.embed_tokens"]
    summary = json.loads((run / "summary.json").read_text())["inits"]
    assert summary.keys() == set(inits)
    assert summary["mashup"]["validation_nll_best"] < summary["random_delta"]["validation_nll_best"]
    torch.testing.assert_close(load_file(run / "finetuned" / WEIGHTS_FILE)[EMBEDDING], merged, atol=1e-6, rtol=0)
    capsys.readouterr()
    other = tmp_path / "other"
    assert mashup("index", "--base", tiny_base, "--pool", str(whole_pool), "--run", str(other)) == 0
    reason = "changes the embeddings or the output head (embed_tokens), which vLLM's LoRA cannot score"
    assert f"{reason}; use search.engine: transformers" in capsys.readouterr().err
    assert pq.read_table(other / "catalogue.parquet")["status"].to_pylist() == ["ok", "set_aside"]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_a_hedge_stops_the_base_where_the_pool_holds_kin(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config |= {"merge": {"k": 1, "weights": "equal"}, "compare": {"mode": "hedge"}}
    run = tmp_path / "run"
    assert mashup("run", run_config(config, tmp_path)) == 0
    assert "after step 2: the mashup goes on, the base is stopped" in capsys.readouterr().err
    found = hedge_of(run)
    assert found["steps"] == {"base": [0, 2], "mashup": [0, 2, 4, 6]}
    hedge = found["hedge"]
    assert (hedge["winner"], hedge["kept"], hedge["step"]) == ("mashup", "mashup", 2)
    assert hedge["validation_nll"]["mashup"] < hedge["validation_nll"]["base"]
    assert hedge["cost"]["step"]["more"] == pytest.approx(1 / 3)
    assert found["parity"] is None
    assert "from the mashup" in (run / "finetuned/README.md").read_text()
    assert (run / "finetuned/adapter_model.safetensors").is_file()
    assert "the base was stopped after 2 of 6 steps" in (run / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert mashup("show", str(run)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the base was stopped after 2 of 6 steps" in shown
    assert "(stopped)" in shown


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hedge_that_is_killed_goes_on_where_it_was(config: dict[str, Any], tmp_path: Path) -> None:
    """Killed when the base has come to the step of the decision, and again once that is made: nothing is trained twice."""
    run = tmp_path / "run"
    config |= {"merge": {"k": 1, "weights": "equal"}, "compare": {"mode": "hedge"}}
    del config["run"], config["train"]["cpus_per_worker"]  # one worker has all CPUs: one arm after the other
    command = Command(config, tmp_path / "log", str(run), tmp_path / "fault", cluster=None)
    for signs in ("base-*/held.json", "hedge-*.json"):
        command.start()
        while not list((run / "train").glob(signs)):
            assert command.ended() is None, command.log.read_text()[-3000:]
            time.sleep(0.05)
        kill(command.processes()[0].pid)
        command.ended(60)
    held = {file: file.stat().st_mtime_ns for file in (run / "train").glob("*/held.json")}
    command.start()
    assert command.ended(600) == 0, command.log.read_text()[-3000:]
    assert {file: file.stat().st_mtime_ns for file in held} == held
    found = hedge_of(run)
    assert found["hedge"]["winner"] == "mashup"
    assert found["steps"] == {"base": [0, 2], "mashup": [0, 2, 4, 6]}


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_the_stages_one_by_one(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    where = ["--base", config["base"], "--pool", config["pool"], "--run", run]
    assert mashup("index", *where) == 0
    search = ["--target", config["target"]["train"], "--samples", "16", "--seed", "1", "--engine", "transformers"]
    assert mashup("search", *where, *search) == 0
    assert "related/" in capsys.readouterr().out
    content = yaml.safe_load((tmp_path / "run/config.yaml").read_text()) | {"merge": {"k": 2, "probe": 1}}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(content))
    assert mashup("merge", "--run", run) == 0
    assert mashup("report", "--run", run) == 0
    assert (tmp_path / "run/report.html").is_file()
    selection = json.loads((tmp_path / "run/selection.json").read_text())
    probed = {candidate["name"]: candidate.get("probe_nll") for candidate in selection["candidates"]}
    assert probed[selection["recipe"]["name"]] < selection["base_probe_nll"]
    content["train"] |= {"steps": 2, "batch_size": 4, "evaluations": 1, "learning_rates": [1e-3]}
    content["train"] |= {"dtype": "float32"}  # in bfloat16, folded and added weights round differently
    content["compare"] = {"inits": ["mashup", "paper", "random_delta", "pissa"]}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(content))
    capsys.readouterr()
    assert mashup("train", "--run", run) == 0
    assert (Path(capsys.readouterr().out.strip()) / "adapter_model.safetensors").is_file()
    assert mashup("compare", "--run", run) == 0
    inits = json.loads((tmp_path / "run/summary.json").read_text())["inits"]
    assert list(inits) == ["mashup", "random_delta", "pissa"]
    assert inits["pissa"]["start_seconds"] > 0
    assert inits["mashup"]["validation_nll_start"] < inits["random_delta"]["validation_nll_start"]
    assert "start paper is left out: ab_mean needs donors of one rank" in capsys.readouterr().err

    # Another way of training: nothing but the comparison is computed anew.
    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.parquet") if file.name != "comparison.parquet"
    }
    content["train"] |= {"method": "full"}
    content["compare"] = {"inits": ["mashup"]}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(content))
    assert mashup("compare", "--run", run) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    again = json.loads((tmp_path / "run/summary.json").read_text())["inits"]["mashup"]
    assert again["validation_nll_start"] == pytest.approx(inits["mashup"]["validation_nll_start"], abs=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run/finetuned")
    assert sorted(path.name for path in (tmp_path / "run/finetuned").iterdir() if path.suffix == ".pt") == []
    assert AutoTokenizer.from_pretrained(tmp_path / "run/finetuned").chat_template
    assert torch.isfinite(whole(torch.tensor([[1, 5, 9]])).logits).all()
