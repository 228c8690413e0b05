"""A task of lm-eval, EleutherAI's harness, as a metric: `compare.metric: lm_eval:TASK` (extra `eval`).

TASK is a name that lm-eval knows, or a YAML file of one that every node sees. Rows, prompts and scores are the task's own; of its
metrics the first one counts, and of its filters the first one, too. The prompt goes through the base's chat template, where it
has one, as the rows did that the arms were trained on.
"""

import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.config import HARNESS
from pipeline.core.errors import InputError, one_line
from pipeline.core.ledger import digest
from pipeline.core.tables import ANSWERS
from pipeline.model.completion_loss import may_share_batches

ROWS_AT_ONCE = 16


def require_harness() -> None:
    """
    Raises:
        InputError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise InputError("install lm-eval to use compare.metric lm_eval:...: pip install '.[eval]'")


def require_task(metric: str) -> None:
    """See that a task can be had, with its data, and scores row by row.

    Raises:
        InputError: it cannot, or does not.
    """
    try:
        tasks = _load(metric)
        summed = [name for name, task in tasks.items() if task.aggregation()[_metric_of(task)].__name__ != "mean"]
    except Exception as error:  # of whatever kind: a task is a program
        raise InputError(f"compare.metric {metric}: the task cannot be loaded ({one_line(error)})") from error
    if summed:
        raise InputError(f"compare.metric {metric}: the first metric of {summed[0]} is no mean over rows")


def task_key(metric: str) -> str:
    """Digest of what a task's rows and scores depend on, as far as it can be seen."""
    file = Path(_name(metric))
    return digest(metric, version("lm_eval"), hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None)


def answer_task(model: Any, tokenizer: PreTrainedTokenizerBase, metric: str) -> pa.Table:
    """What a transformers model answers to the rows of a task, with their scores; schema ANSWERS, `sample_id` the row's number
    behind the task's name."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model.generation_config = GenerationConfig()  # the base's own may ask for draws and penalties
    tasks = _load(metric)
    at_once = ROWS_AT_ONCE if may_share_batches(model) else 1
    judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=at_once)
    templated = tokenizer.chat_template is not None
    found = simple_evaluate(judged, tasks=[*tasks.values()], bootstrap_iters=0, apply_chat_template=templated)["samples"]
    rows = [_row(name, one, _metric_of(tasks[name])) for name, samples in found.items() for one in _first_filter(samples)]
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def _name(metric: str) -> str:
    return metric.removeprefix(HARNESS)


def _load(metric: str) -> dict[str, Any]:
    """The tasks of that name, by their own: a group has several."""
    from lm_eval.tasks import TaskManager

    name = _name(metric)
    tasks: dict[str, Any] = TaskManager(include_defaults=not Path(name).is_file()).load([name])["tasks"]
    return tasks


def _metric_of(task: Any) -> str:
    return str(next(iter(task.aggregation())))


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in samples if one["filter"] == samples[0]["filter"]]


def _row(task: str, sample: dict[str, Any], metric: str) -> dict[str, Any]:
    prompt, *_ = sample["arguments"][0]
    reference, answer = _said(sample)
    score = float(sample[metric])
    return {"sample_id": f"{task}/{sample['doc_id']}", "prompt": prompt, "reference": reference, "answer": answer, "score": score}


def _said(sample: dict[str, Any]) -> tuple[str, str]:
    """The right answer and the one that was given: of several options the likeliest, else what was written."""
    target, given = sample["target"], sample["filtered_resps"]
    options = [str(option) for _, option in sample["arguments"]]
    if len(options) == 1:
        return str(target), str(given[0]).strip()
    best = max(range(len(options)), key=lambda place: given[place][0])
    return (options[target] if isinstance(target, int) else str(target)).strip(), options[best].strip()
