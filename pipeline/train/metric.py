"""`compare.metric`: what the chosen weights of each start answer on the test split, scored row by row.

    choices, choices_per_token   1 where the right one of a row's choices is the likeliest, else 0
    exact_match                  1 where what is written equals the right answer once both are normalised, else 0 (`scores.py`)
    lm_eval:TASK                 the task's own rows and scores (`harness.py`)
    package.module:function      what the function gives of what is written (`scores.py`)

Answers are kept beside each arm's result, and so are the scores of what is written: who was interrupted goes on with them.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import pyarrow as pa

from pipeline.config import BY_CHOICES, HARNESS
from pipeline.core.errors import InputError
from pipeline.core.ledger import digest
from pipeline.core.storage import Folder
from pipeline.core.tables import METRIC_ROWS, TEST
from pipeline.model.base_model import load_tokenizer
from pipeline.run_folder import Run
from pipeline.train.arm import Job, checkpoints_without
from pipeline.train.harness import require_harness, require_task, task_key
from pipeline.train.ray_train import choose_on_test, on_each
from pipeline.train.scores import function_of, is_own, score, source_of
from pipeline.train.tune import Outcome

TRIED = 2
"""Rows of the test split that a function is tried on before anything is trained."""

MAX_PROMPT = 600
"""Characters of a prompt in the table of rows; of a longer one the middle is left out."""

Arms = Mapping[str, Sequence[Outcome]]
"""The chosen arms of each init, one a seed."""


class Measured(NamedTuple):
    """Mean scores of each init's arms, in their order; of the rows what METRIC_ROWS says; and of how many arms answers were made
    now, the others' being kept from before."""

    means: dict[str, list[float]]
    rows: pa.Table
    answered: int


def check(metric: str | None) -> None:
    """See that what a metric needs can be had, before anything is spent.

    Raises:
        InputError: lm-eval is not installed, or there is no such module, or no such function in it.
    """
    if is_task(metric):
        require_harness()
    elif is_own(metric):
        function_of(str(metric))


def is_task(metric: str | None) -> bool:
    """Whether a metric is a task of lm-eval."""
    return metric is not None and metric.startswith(HARNESS)


def try_out(run: Run) -> None:
    """See that the test split can be measured as `compare.metric` asks, once it is drawn and before anything is trained.

    Raises:
        InputError: there is no such task, a row has no choices or no prompt to write from, or the function fails on right
            answers.
    """
    metric = run.config.compare.metric
    if metric is None:
        return
    if is_task(metric):
        require_task(metric)
        return
    rows = _test_rows(run.folder.sub("data"))
    if metric in BY_CHOICES:
        _require_choices(rows, metric)
        return
    from pipeline.train.answers import asked, texts_of  # not above: see pipeline/train/ray_train.py

    if not all(row.prompt for row in asked(rows)):
        raise InputError(f"compare.metric {metric}: a row of the test split is text alone, without a prompt to write from")
    prompts, references = texts_of(rows.slice(0, TRIED), load_tokenizer(run.config.base))
    score(metric, prompts, references, references)


def metric_key(metric: str, data: Folder) -> str:
    """Digest of what scores depend on besides the weights: rows and choices, and the source of a function's module."""
    return digest(metric, _answers_key(metric, data), source_of(metric))


def measure(metric: str, job: Job, arms: Arms, storage: Folder) -> Measured:
    """Answers and scores of the arms on the test split.

    Args:
        job: that of any arm.
        storage: where `train_arms` left the arms.

    Raises:
        InputError: the function fails, or gives something else than one finite number a row.
    """
    all_arms = [arm for chosen in arms.values() for arm in chosen]
    answers, made = _answers(metric, job, all_arms, storage)
    file = f"scores-{metric_key(metric, job.data)}.json"
    scored = {name: _with_scores(metric, found, storage.sub(name), file) for name, found in answers.items()}
    means = {init: [fmean(scored[arm["name"]]["score"].to_pylist()) for arm in chosen] for init, chosen in arms.items()}
    by_seed = {(init, arm["seed"]): scored[arm["name"]] for init, chosen in arms.items() for arm in chosen}
    return Measured(means, _rows(by_seed), made)


def _require_choices(rows: pa.Table, metric: str) -> None:
    if without := rows["choices"].null_count:
        raise InputError(
            f"compare.metric {metric}: {without} of {len(rows)} rows of the test split have no `choices` that can be used, lists "
            "of two texts or more with the answer (target.columns names another column; `mashup run` reads them anew)"
        )


def _test_rows(data: Folder) -> pa.Table:
    """The test split, schema TEST; what an older version drew has no choices."""
    rows = data.read_table("test.parquet")
    nothing = pa.nulls(len(rows), TEST.field("choices").type)
    return rows if "choices" in rows.column_names else rows.append_column("choices", nothing)


def _answers_key(metric: str, data: Folder) -> str:
    """Digest of what answers depend on besides the weights."""
    if is_task(metric):
        return task_key(metric)
    by_choices = metric in BY_CHOICES
    rows = _test_rows(data).select(["sample_id", "choices"] if by_choices else ["sample_id"])
    return digest(metric if by_choices else "written", rows.to_pylist())


def _answers(metric: str, job: Job, arms: Sequence[Outcome], storage: Folder) -> tuple[dict[str, pa.Table], int]:
    """What each arm answers, schema ANSWERS, by its name; those that are not there yet are made, and counted."""
    file = f"answers-{_answers_key(metric, job.data)}.parquet"
    missing = checkpoints_without(file, arms, storage)
    for name, found in _answered(metric, job, missing, storage):
        storage.write_table(f"{name}/{file}", found)
    return {arm["name"]: storage.read_table(f"{arm['name']}/{file}") for arm in arms}, len(missing)


def _answered(metric: str, job: Job, checkpoints: dict[str, Folder], storage: Folder) -> Iterator[tuple[str, pa.Table]]:
    """Name and answers of each checkpoint, as they come."""
    from pipeline.train.answers import answers_on_test  # not above: see pipeline/train/ray_train.py

    if checkpoints and job.train.shard:
        yield from choose_on_test(job, checkpoints, storage, metric).items()
    else:
        yield from on_each(answers_on_test, job, checkpoints, metric)


def _with_scores(metric: str, answers: pa.Table, arm: Folder, file: str) -> pa.Table:
    """Answers with their scores; those of what was written are kept."""
    if metric in BY_CHOICES or is_task(metric):
        return answers
    if not arm.is_complete(file):
        texts = (answers[name].to_pylist() for name in ("prompt", "answer", "reference"))
        arm.write_json(file, score(metric, *texts))
    scores = pa.array(arm.read_json(file), pa.float64())
    return answers.set_column(answers.column_names.index("score"), "score", scores)


def _rows(found: Mapping[tuple[str, int], pa.Table]) -> pa.Table:
    """Base and mashup side by side, schema METRIC_ROWS.

    Args:
        found: answers with scores, by init and seed.
    """
    seeds = sorted({seed for init, seed in found if init in ("base", "mashup")})
    return pa.concat_tables([METRIC_ROWS.empty_table(), *(_rows_of_seed(found, seed) for seed in seeds)])


def _rows_of_seed(found: Mapping[tuple[str, int], pa.Table], seed: int) -> pa.Table:
    base, mashup = found.get(("base", seed)), found.get(("mashup", seed))
    rows = base or mashup
    assert rows is not None
    nothing = pa.nulls(len(rows))
    columns = {
        "sample_id": rows["sample_id"],
        "seed": pa.array([seed] * len(rows)),
        "prompt": pa.array(map(_shortened, rows["prompt"].to_pylist())),
        "reference": rows["reference"],
        **{
            f"{init}_{name}": table[name] if table else nothing
            for init, table in (("base", base), ("mashup", mashup))
            for name in ("answer", "score")
        },
    }
    return pa.table(columns).cast(METRIC_ROWS)


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= MAX_PROMPT else f"{prompt[: MAX_PROMPT // 2]} … {prompt[-MAX_PROMPT // 2 :]}"
