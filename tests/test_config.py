"""The config file: defaults, and messages that name the file, the key and the value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import Config, build_config, load_config
from pipeline.core.errors import InputError

MINIMAL: dict[str, Any] = {"run": "runs/x", "base": "org/model", "pool": "adapters/", "target": {"train": "train.jsonl"}}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
        return str(path)

    return write


def test_four_keys_are_enough(write: Callable[..., str]) -> None:
    config = load_config(write())
    assert (config.run, config.base, config.pool, config.target.train) == ("runs/x", "org/model", "adapters/", "train.jsonl")
    assert (config.search.samples, config.merge.k, config.train.steps) == (128, "auto", 100)
    assert config.target.validation is None
    assert config.compare.inits == ("base", "mashup")


def test_values_of_the_file_replace_defaults(write: Callable[..., str]) -> None:
    sections = {
        "search": {"samples": 16, "engine": "transformers", "actors": 2},
        "merge": {"k": 3, "method": "ab_mean", "rank": 8},
        "train": {"learning_rates": [1e-3], "seeds": [1, 2]},
    }
    config = load_config(write(**sections))
    assert (config.search.samples, config.search.engine, config.search.actors) == (16, "transformers", 2)
    assert (config.merge.k, config.merge.method, config.merge.rank) == (3, "ab_mean", 8)
    assert (config.train.learning_rates, config.train.seeds) == ((1e-3,), (1, 2))


def test_overrides_win_unless_they_are_none(write: Callable[..., str]) -> None:
    config = load_config(write(), run="runs/y", base=None)
    assert (config.run, config.base) == ("runs/y", "org/model")


def test_a_config_is_frozen_and_reads_back_from_its_own_dump() -> None:
    config = build_config(MINIMAL, "test")
    assert build_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), "again") == config
    with pytest.raises(ValidationError, match="frozen"):
        config.run = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serach": {}}, r"unknown key 'serach' \(known there: run, base, pool, exclude, checkpoints, target"),
        ({"search": {"sample": 3}}, r"unknown key 'search.sample' \(known there: samples, holdout"),
        ({"target": {}}, "key 'target.train' is missing"),
        ({"base": 5}, "base: .*got 5"),
        ({"search": {"samples": 1}}, "search.samples: .*greater than or equal to 2, got 1"),
        ({"search": {"samples": "many"}}, "search.samples: .*got 'many'"),
        ({"search": {"engine": "tgi"}}, "search.engine: .*'vllm' or 'transformers', got 'tgi'"),
        ({"search": {"budget": 0}}, "search.budget.share: .*got 0"),
        ({"search": {"budget": "half"}}, "search.budget: must be a number, or one of share, seconds and confidence"),
        ({"search": {"budget": {"seconds": 9, "share": 0.1}}}, "search.budget: must be one of .* not share and seconds"),
        ({"search": {"budget": {}}}, "search.budget: must be one of .* not none"),
        ({"search": {"budget": {"minutes": 1}}}, "unknown key 'search.budget.minutes'"),
        ({"search": {"holdout": 1.0}}, "search.holdout: .*got 1.0"),
        ({"search": None}, "search: .*got None"),
        ({"merge": {"k": 0}}, "merge.k: must be from 1 to 1024, got 0"),
        ({"merge": {"rank": -3}}, "merge.rank: must be from 1 to 1024, got -3"),
        ({"merge": {"method": "concat", "rank": 8}}, "merge: method concat keeps the sum of the donors' ranks"),
        ({"train": {"learning_rates": []}}, "train.learning_rates: "),
        ({"merge": {"rank": 10**9}}, "merge.rank: must be from 1 to 1024"),
        ({"train": {"seeds": [0, -1]}}, "train.seeds: must be from 0"),
        ({"train": {"seeds": [2**40]}}, "train.seeds: must be from 0"),
        ({"train": {"batch_size": 10**9}}, "train.batch_size: .*less than or equal to 1048576"),
        ({"train": {"cpus_per_worker": float("nan")}}, "train.cpus_per_worker: must be positive"),
        ({"search": {"cpus_per_actor": float("inf")}}, "search.cpus_per_actor: must be positive"),
        ({"train": {"learning_rates": [1e-4, -1.0]}}, "train.learning_rates: must be positive, got -1.0"),
        ({"train": {"learning_rates": [float("nan")]}}, "train.learning_rates: must be positive, got nan"),
        ({"train": {"steps": 0}}, "train.steps: .*got 0"),
        ({"train": {"steps": 10**30}}, "train.steps: .*less than or equal to 1000000"),
        ({"train": {"seeds": [0, 0]}}, "train.seeds: must not name one twice"),
        ({"train": {"learning_rates": [1e-4, 1.00000001e-4]}}, "train.learning_rates: must not name one twice"),
        ({"train": {"learning_rates": [True]}}, "train.learning_rates: must not be true or false"),
        ({"search": {"budget": True}}, "search.budget: must not be true or false, got True"),
        ({"search": {"store": ""}}, "search.store: must be a text of 1 to 4096 characters"),
        ({"run": "a\nb"}, "run: must be a text .* that can be printed, got 'a.{1,2}nb'"),
        ({"pool": " "}, "pool: must be a text"),
        ({"base": "x" * 5000}, "base: must be a text"),
        ({"run": "adapters/run"}, "run: adapters/run lies in the pool adapters/"),
        ({"search": {"store": "adapters"}}, "search.store: adapters lies in the pool"),
        ({"run": "d", "target": {"train": "d/t.jsonl"}}, "target.train: d/t.jsonl lies in the run folder d,"),
        ({"pool": "runs/../out/pool.txt", "run": "out"}, "pool: runs/../out/pool.txt lies in the run folder out"),
        ({"merge": {"probe": 4}, "train": {"shard": True}}, "merge.probe trains on one device"),
        (
            {"train": {"quantize": "nf4", "method": "full"}},
            "nf4 is of a frozen base, train.method full trains all .* leave one out",
        ),
        ({"train": {"quantize": "nf4", "shard": True}}, "nf4 keeps the base whole on each device, train.shard .* leave one out"),
        ({"train": {"quantize": "int4"}}, "train.quantize: .*'none' or 'nf4', got 'int4'"),
        ({"train": {"workers": 2, "min_workers": 3}}, "train.min_workers 3 is above train.workers 2"),
        (
            {"train": {"workers": 2, "gpus_per_worker": 4}},
            "train.gpus_per_worker 4: .*set it to 1 and train.workers to 8",
        ),
        ({"train": {"tokens_per_pass": 0}}, "train.tokens_per_pass: must be positive"),
        ({"compare": {"metric": "accuracy"}}, "compare.metric: must be choices, .*, lm_eval:TASK or package"),
        ({"compare": {"metric": "own.metrics:"}}, "compare.metric: must be choices, .*got 'own.metrics:'"),
        ({"compare": {"metric": "exact_match"}, "train": {"shard": True}}, "exact_match has answers written .* use choices or"),
        ({"compare": {"metric": "own:f1"}, "train": {"shard": True}}, "own:f1 has answers written on one device"),
        (
            {"compare": {"inits": ["base", "eva"]}, "train": {"shard": True}},
            "compare.inits: eva begins a fresh adapter .* leave it",
        ),
        ({"compare": {"inits": ["base", "olora"]}, "train": {"method": "full"}}, "compare.inits: olora begins a fresh adapter"),
        ({"compare": {"inits": ["base", "pissa"]}, "train": {"quantize": "nf4"}}, "pissa takes a part of the base's weights"),
        ({"train": {"method": "full", "lora_plus": 4}}, "train.lora_plus is for adapters"),
        ({"train": {"lora_plus": 0}}, "train.lora_plus: .*got 0"),
        (
            {"compare": {"mode": "hedge", "inits": ["base", "mashup", "eva"]}},
            "compare: .*hedge is between base and mashup; leave",
        ),
        ({"compare": {"mode": "hedge"}, "train": {"seeds": [0, 1]}}, "hedge is for one good model, .* give one seed"),
        ({"compare": {"mode": "hedge"}, "train": {"steps": 2}}, "a third of train.steps, which are 2; use 3 or more"),
        ({"compare": {"inits": ["base", "base"]}}, "compare.inits: must not name one twice"),
        ({"compare": {"inits": ["random"]}}, "compare.inits.0: .*got 'random'"),
        ({"compare": {"inits": [], "more": 1}}, "compare.inits: .*unknown key 'compare.more'"),
    ],
)
def test_what_is_wrong_is_named_with_its_key_and_value(changes: dict[str, Any], message: str, write: Callable[..., str]) -> None:
    path = write(**changes)
    with pytest.raises(InputError, match=message) as refusal:
        load_config(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "metric", ["choices", "choices_per_token", "exact_match", "own:f1", "my.own.metrics:f_1", "lm_eval:a/t.yaml"]
)
def test_a_metric_is_one_of_ours_or_a_function(metric: str, write: Callable[..., str]) -> None:
    assert load_config(write(compare={"metric": metric})).compare.metric == metric


def test_choices_are_measured_of_a_base_that_no_device_holds(write: Callable[..., str]) -> None:
    assert load_config(write(compare={"metric": "choices"}, train={"shard": True})).train.shard


@pytest.mark.parametrize("field", ["actors", "cpus_per_actor", "gpus_per_actor"])
def test_numbers_of_resources_are_not_negative(field: str) -> None:
    with pytest.raises(InputError, match=f"search.{field}"):
        build_config({**MINIMAL, "search": {field: -1}}, "test")


def test_every_field_but_the_plain_ones_says_what_it_is() -> None:
    fields = {name: field for name, field in Config.model_fields.items() if field.annotation is str}
    assert all(field.description for field in fields.values())


def test_a_local_base_is_made_absolute_for_workers_that_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    content = {"run": "r", "pool": "p", "target": {"train": "t"}}
    assert build_config({**content, "base": "~/model"}, "test").base == str(tmp_path / "model")
    assert build_config({**content, "base": "model"}, "test").base == str(tmp_path / "model")
    assert build_config({**content, "base": "org/model"}, "test").base == "org/model"


@pytest.mark.parametrize("dotted", ["run", "pool", "base", "target.train", "search.store"])
def test_credentials_are_refused_and_not_shown(dotted: str) -> None:
    content: dict[str, Any] = {"run": "r", "base": "b", "pool": "p", "target": {"train": "t"}, "search": {}}
    *sections, key = dotted.split(".")
    (content[sections[0]] if sections else content)[key] = "s3://KEY:SECRET@bucket/x"
    with pytest.raises(InputError, match=f"{dotted}: .*no credentials.*s3://[.]{{3}}@bucket/x") as caught:
        build_config(content, "c.yaml")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("budget", [0.1, {"share": 0.1}, {"seconds": 60}])
def test_an_editor_with_the_schema_takes_a_budget_as_the_command_does(budget: Any) -> None:
    content = {**MINIMAL, "search": {"budget": budget}}
    assert build_config(content, "test")
    jsonschema.validate(content, Config.model_json_schema())


def test_an_editor_with_the_schema_refuses_a_budget_that_is_none() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**MINIMAL, "search": {"budget": "much"}}, Config.model_json_schema())
