"""The data sets of the paper's protocol (arXiv 2603.10156), for a GPU cluster with access to the Hugging Face Hub.

    python -m benchmarks.paper [--out FOLDER]                              # writes <task>/train.jsonl and test.jsonl
    python -m benchmarks.study --base google/gemma-3-1b-it --tasks FOLDER --settings benchmarks/paper.yaml
    python -m benchmarks.study --base google/gemma-3-1b-it --tasks FOLDER --settings benchmarks/paper_full.yaml
    python -m benchmarks.paper --lots-of-loras FILE                        # writes a list file: the adapters for Mistral-7B

Each row asks for the letter or number of the right choice, by the labels that the paper's code has: 0 and 1 in WinoGrande, 1 to
3 in SocialIQA, a to e in MathQA, those of the data set itself where it has some, and capital letters elsewhere. The wording is
ours; the file beside train.jsonl is the published validation split, which the paper reports on.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import load_dataset
from huggingface_hub import HfApi

Row = dict[str, str]
PARQUET = "refs/convert/parquet"
"""The Hub's own Parquet copy of data sets that come as a loading script."""

LOTS_OF_LORAS, MISTRAL = "Lots-of-LoRAs", "Mistral-7B-Instruct-v0.2"


def ask(question: str, choices: Sequence[str], right: int, labels: Sequence[str] = "ABCDE") -> Row:
    """A question with its choices, each behind its label; `right`: the place of the right one."""
    labels = labels[: len(choices)]
    listed = "\n".join(f"{label}. {choice}" for label, choice in zip(labels, choices, strict=True))
    kind = "number" if labels[0].isdigit() else "letter"
    return {"prompt": f"{question}\n{listed}\nAnswer with the {kind} alone.", "completion": labels[right]}


def labelled(question: str) -> Callable[[Any], Row]:
    """ARC, CommonsenseQA and OpenBookQA: choices with labels of their own."""

    def make(row: Any) -> Row:
        labels = row["choices"]["label"]
        return ask(row[question], row["choices"]["text"], labels.index(row["answerKey"]), labels)

    return make


def math_qa(row: Any) -> Row:
    """Its options are one text: `a ) 38 , b ) 27.675 , c ) 30`."""
    parts = row["options"].replace("a )", "", 1)
    choices = []
    for letter in "bcde":
        choice, _, parts = parts.partition(f" , {letter} )")
        choices.append(choice.strip())
    return ask(row["Problem"], [*choices, parts.strip()], "abcde".index(row["correct"]), "abcde")


DATA_SETS: dict[str, tuple[dict[str, Any], Callable[[Any], Row]]] = {
    "arc_easy": ({"path": "allenai/ai2_arc", "name": "ARC-Easy"}, labelled("question")),
    "commonsense_qa": ({"path": "tau/commonsense_qa"}, labelled("question")),
    "hellaswag": (
        {"path": "Rowan/hellaswag", "revision": PARQUET},
        lambda row: ask(f"How does this go on? {row['ctx']}", row["endings"], int(row["label"])),
    ),
    "math_qa": ({"path": "allenai/math_qa", "revision": PARQUET}, math_qa),
    "openbookqa": ({"path": "allenai/openbookqa", "name": "main"}, labelled("question_stem")),
    "piqa": (
        {"path": "ybisk/piqa", "revision": PARQUET},
        lambda row: ask(row["goal"], [row["sol1"], row["sol2"]], int(row["label"])),
    ),
    "social_iqa": (
        {"path": "allenai/social_i_qa", "revision": PARQUET},
        lambda row: ask(
            f"{row['context']} {row['question']}", [row[f"answer{letter}"] for letter in "ABC"], int(row["label"]) - 1, "123"
        ),
    ),
    "winogrande": (
        {"path": "allenai/winogrande", "name": "winogrande_xl", "revision": PARQUET},
        lambda row: ask(
            f"What fills the blank? {row['sentence']}", [row["option1"], row["option2"]], int(row["answer"]) - 1, "01"
        ),
    ),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder for <task>/train.jsonl and test.jsonl.")] = Path(".cache/paper"),
    lots_of_loras: Annotated[str, typer.Option(help="Write this list file of adapters instead.")] = "",
) -> None:
    """Write the data sets that are not there yet."""
    if lots_of_loras:
        found = [model.id for model in HfApi().list_models(author=LOTS_OF_LORAS) if MISTRAL in model.id]
        Path(lots_of_loras).write_text("".join(f"{name}\n" for name in sorted(found)))
        return
    for task, (source, make) in DATA_SETS.items():
        if not (out / task / "test.jsonl").exists():
            data = load_dataset(**source)
            for split, name in (("train", "train"), ("validation", "test")):
                write(out / task / f"{name}.jsonl", (make(row) for row in data[split]))
    print(out)


def write(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    typer.run(main)
