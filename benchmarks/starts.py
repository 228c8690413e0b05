"""Which start ends lowest: how many donors, with which weights, at which rank? A few finetuning steps from each, in this process.

    python -m benchmarks.starts --base BASE --pool FOLDER --tasks FOLDER [--only TASK ...] [--start exact-1@32 ...]

A start is RECIPE-DONORS@RANK, or base@RANK, with the recipes exact (equal weights), gains, learned and paper (A and B averaged
apart). Donors are ranked on the search rows of each task; adapters that are named like it are left out. The trained adapter
has the rank of the start, with fresh rank where the donors leave room, and the alpha of `alpha_at`. Data as in
`benchmarks.study`: validation and search rows come out of train.jsonl, the other file is the test split. Each line is a start
that is done; what stands in the file `--out` is not trained again.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from pipeline.adapters.adapter import Indexed, alpha_at, hash_of, read_adapter, write_adapter
from pipeline.config import TrainConfig
from pipeline.core.file_names import CONFIG_FILE
from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID, SAMPLES
from pipeline.data.tokenise import Reading, tokenise_text
from pipeline.engines.scorer import Candidate, EngineConfig
from pipeline.engines.transformers import TransformersScorer
from pipeline.merge.learned_weights import learn_weights
from pipeline.merge.recipes import Recipe, merge
from pipeline.model.base_model import linear_shapes, load_tokenizer
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.evaluate import Rows, as_metrics, evaluate
from pipeline.train.loop import Finetuning

SEARCH, VALIDATION, TEST, MAX_TOKENS = 24, 48, 100, 1024
TRAIN = TrainConfig(steps=24, batch_size=8, learning_rates=(5e-4,), evaluations=3)
STARTS = ("base@32", "exact-1@32", "exact-3@32", "gains-5@32", "learned-5@32", "paper-2@32")


def main(
    base: Annotated[str, typer.Option(help="Base model folder.")],
    pool: Annotated[Path, typer.Option(help="Folder of adapters.")],
    tasks: Annotated[list[Path], typer.Option(help="Folders of <task>/train.jsonl and test.jsonl or validation.jsonl.")],
    only: Annotated[list[str], typer.Option(help="Only these tasks.")] = [],  # noqa: B006
    start: Annotated[list[str], typer.Option(help="Starts, as above.")] = list(STARTS),  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    out: Annotated[Path, typer.Option(help="Lines of JSON, one a start.")] = Path(".cache/starts.jsonl"),
) -> None:
    """Train from each start; print and keep a line for each."""
    known = {_key(row) for row in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    for folder in (train.parent for place in tasks for train in sorted(place.glob("*/train.jsonl"))):
        wanted = [one for one in start if _key({"task": folder.name, "start": one, "seed": seed}) not in known]
        if not wanted or (only and folder.name not in only):
            continue
        for row in _train_all(base, pool.resolve(), folder, wanted, seed):
            line = json.dumps(row)
            print(line, flush=True)
            with out.open("a") as file:
                file.write(line + "\n")


def _train_all(base: str, pool: Path, task: Path, starts: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    with TemporaryDirectory() as scratch:
        data, place = Folder.at(scratch), Path(scratch)
        rows = _rows(task / "train.jsonl", base)
        test = next(file for name in ("test", "validation") if (file := task / f"{name}.jsonl").exists())
        data.write_table("validation.parquet", rows.slice(0, VALIDATION))
        data.write_table("train.parquet", rows.slice(VALIDATION))
        held = Rows(_rows(test, base).slice(0, TEST))
        sample = rows.slice(VALIDATION, SEARCH)
        donors = _ranked(
            base, sorted(path.parent for path in pool.glob(f"*/{CONFIG_FILE}") if path.parent.name != task.name), sample
        )
        for name in starts:
            lora = _make(name, base, donors, sample, place / name)
            arm = Arm(BASE_ID if name.startswith("base") else name, TRAIN.learning_rates[0], seed)
            finetuning = Finetuning(Job(arm, base, lora, TRAIN, data, data.sub(name), name), 0, 1, lambda metrics, snapshot: None)
            finetuning.run()
            curve = [(point["step"], round(point["eval_nll"], 4)) for point in finetuning.curve]
            metrics = as_metrics(evaluate(finetuning.trainable.score, held))
            found = {key.removeprefix("eval_"): round(value, 4) for key, value in metrics.items()}
            yield {"task": task.name, "start": name, "seed": seed, "validation_nll": curve, "test": found}


def _rows(file: Path, base: str) -> pa.Table:
    """The usable rows of a file, each content once, in the order that `pipeline.data.splits` draws them."""
    tokenizer, reading = load_tokenizer(base), Reading(MAX_TOKENS)
    found = [tokenise_text(line.encode(), tokenizer, 0, reading) for line in file.read_text().split("\n") if line.strip()]
    usable = {row["sample_id"]: {**row, "split": "train"} for row in found if "sample_id" in row}
    return pa.Table.from_pylist(sorted(usable.values(), key=lambda row: row["draw_key"]), schema=SAMPLES)


def _ranked(base: str, adapters: Sequence[Path], sample: pa.Table) -> dict[Path, float]:
    """The adapters with their gains over the base on the sample, in nats a token, the largest first."""
    scorer = TransformersScorer(EngineConfig(base, "auto", 0, (), MAX_TOKENS, 1))

    def nll(folder: Path | None) -> float:
        scores = scorer.score([Candidate("-", folder)], sample)
        return float(np.sum(scores["nll_sum"]) / np.sum(scores["n_tokens"]))

    alone = nll(None)
    gains = {adapter: alone - nll(adapter) for adapter in adapters}
    return dict(sorted(gains.items(), key=lambda pair: -pair[1]))


def _make(start: str, base: str, donors: dict[Path, float], sample: pa.Table, target: Path) -> Lora:
    """Write the adapter of a start to `target`, unless it is the base; gives the shape that is trained."""
    name, _, rank = start.partition("@")
    kind, _, count = name.partition("-")
    top = list(donors)[: int(count or 1)]
    adapters = [read_adapter(adapter, base=base) for adapter in top]
    if kind != "base":
        weights = (1 / len(top),) * len(top)
        if kind == "gains":
            total = sum(max(0.0, donors[one]) for one in top)
            weights = tuple(max(0.0, donors[one]) / total for one in top)
        elif kind == "learned":
            weights, _ = learn_weights(base, [Indexed(str(one), hash_of(one)) for one in top], sample)
        recipe = Recipe(tuple(map(str, top)), weights, "ab_mean" if kind == "paper" else "exact", int(rank))
        write_adapter(target, merge(recipe, adapters, base, linear_shapes(base)[0]).adapter, base=base)
    first = adapters[0]
    alpha = alpha_at(int(rank), first.max_rank, first.scale(first.modules[0]))
    return Lora(int(rank), alpha, tuple(first.target_leaves))


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["start"], row["seed"]


if __name__ == "__main__":
    typer.run(main)
