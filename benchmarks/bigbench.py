"""Real tasks for the study: BIG-bench's own and its natural_instructions subtasks, from the registry's source archive.

    python -m benchmarks.bigbench [--out .cache/bigbench]       # downloads 358 MB once; prints the folder of the tasks
    python -m benchmarks.study --tasks .cache/bigbench          # trains a donor on each, then leave-one-out

PyPI's package `bigbench` (Apache-2.0) is downloaded, never installed, and only its task.json files are read. Each task becomes
train.jsonl and test.jsonl of {"prompt": ..., "completion": ...}: a seeded draw of its examples, no prompt twice, of several right
answers the first. A multiple-choice example lists its choices in the prompt.
"""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

PACKAGE = "bigbench==1.0.0"
ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks"
NATURAL = "natural_instructions/subtask"
TASKS = (
    f"{NATURAL}036_qasc_topic_word_to_generate_related_fact",
    f"{NATURAL}038_qasc_combined_fact",
    f"{NATURAL}040_qasc_question_generation",
    f"{NATURAL}041_qasc_answer_generation",
    f"{NATURAL}042_qasc_incorrect_option_generation",
    f"{NATURAL}004_mctaco_answer_generation_event_duration",
    f"{NATURAL}010_mctaco_answer_generation_event_ordering",
    f"{NATURAL}016_mctaco_answer_generation_frequency",
    f"{NATURAL}033_winogrande_answer_generation",
    f"{NATURAL}046_miscellaenous_question_typing",
    "multiemo/hotels_sentence_en",
    "multiemo/medicine_sentence_en",
    "multiemo/products_sentence_en",
    "unit_conversion/different_systems",
    "unit_conversion/si_conversion",
    "linguistic_mappings/question_formation_json",
    "linguistic_mappings/sentence_negation_json",
    "object_counting",
)
"""Of families of two to five, and one that stands alone; short enough for a small machine."""

TRAIN_ROWS, TEST_ROWS = 800, 200
TEST_SHARE = 0.3
"""Of the examples where there are fewer than both splits want."""

MAX_PREFIX = 200
"""Characters: a task's instruction is part of its prompts where it is a sentence or two, and not where it is a page."""

Row = dict[str, str]


def main(
    out: Annotated[Path, typer.Option(help="Folder for <task>/train.jsonl and test.jsonl.")] = Path(".cache/bigbench"),
) -> None:
    """Write the tasks that are not there yet."""
    missing = {f"{ROOT}/{task}/task.json": name_of(task) for task in TASKS if not (out / name_of(task) / "test.jsonl").exists()}
    if missing:
        with tarfile.open(_archive(out)) as archive:
            for member in archive:
                if member.name in missing and (file := archive.extractfile(member)):
                    _write(out / missing[member.name], list(rows_of(json.load(file))))
    print(out)


def name_of(task: str) -> str:
    """A folder's name: the subtask without its number, or the task and its part."""
    return task.split("_", 2)[2] if task.startswith(NATURAL) else task.replace("/", "__").removesuffix("_json")


def rows_of(task: dict[str, Any]) -> Iterator[Row]:
    """The examples of a task.json, as prompt and completion."""
    prefix = task.get("task_prefix") or ""
    prefix = prefix if len(prefix) <= MAX_PREFIX else ""
    for example in task["examples"]:
        question, scores = f"{prefix}{example['input']}".strip(), example.get("target_scores")
        if scores:
            choices = "\n".join(f"- {choice}" for choice in scores)
            question = f"{question}\nChoices:\n{choices}\nAnswer with one of the choices."
            answer = max(scores, key=lambda choice: scores[choice])
        else:
            answer = example["target"] if isinstance(example["target"], str) else next(iter(example["target"]), "")
        if question and answer.strip():
            yield {"prompt": question, "completion": answer.strip()}


def _write(folder: Path, rows: list[Row]) -> None:
    rows = list({row["prompt"]: row for row in reversed(rows)}.values())
    Random(0).shuffle(rows)
    n_test = min(TEST_ROWS, int(TEST_SHARE * len(rows)))
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows[n_test : n_test + TRAIN_ROWS]), ("test", rows[:n_test])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))


def _archive(out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    found = next(out.glob("bigbench-*.tar.gz"), None)
    if found is None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            str(out),
            PACKAGE,
        ]
        if subprocess.run(pip, stdout=sys.stderr).returncode != 0:
            raise SystemExit(f"pip finds no source archive of {PACKAGE} (its message is above)")
        found = next(out.glob("bigbench-*.tar.gz"))
    return found


if __name__ == "__main__":
    typer.run(main)
