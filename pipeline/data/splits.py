"""Target data -> tokenised splits: a small sample to search with, and the training splits.

Tasks read and tokenise the files and leave shards; the draw is made of the shards' hashes (`draw.py`), and tasks write what it
says. What the driver holds are counts, and the sample.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ExecutionResources

from pipeline.config import BY_CHOICES, ROLES, Config
from pipeline.core.errors import InputError, is_transient, one_line
from pipeline.core.lock import nobody_else
from pipeline.core.node_folder import temporary_folder
from pipeline.core.parts import Parts
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.data.draw import Cut, Draw, Found, Shards
from pipeline.data.files import source_of
from pipeline.data.forms import FORMS
from pipeline.data.readers import first_malformed, first_rows, read_rows, unreadable
from pipeline.data.shards import SHARDS, USED, USED_BUT, shortened
from pipeline.data.tokenise import Reading, tokenise_shard, tokenise_text
from pipeline.model.base_model import context_length, load_tokenizer, vocabulary

SPLIT_OFF = 0.1
"""Share of the train rows that becomes a validation or test split that was not given."""

LEAST_LEFT = 0.5
"""Share of the train rows that must be in no other split that was given; where fewer are, one file was taken for another."""

MAX_PROBLEMS = 10
"""Reasons to pass rows over that are told apart."""

FIRST_AT_ONCE = 1000
"""Rows that are looked at, at a time, for the first of a data set."""

UNORDERED = "tokenised"
"""Folder of the shards, for as long as they are needed."""

ONE_PROCESS = 4 << 20
"""Bytes of a target that one process reads: a second one takes as long to import what it needs, and the CPU from what goes on
beside it."""

Counts = dict[str, dict[str, int]]
"""How many rows of a role were used, and how many passed over for which reason."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn of a target: the sample, schema SAMPLES, and how many rows each training split has."""

    sample: pa.Table
    sizes: dict[str, int]
    counts: Counts


@dataclass(frozen=True)
class Splits:
    """What a target gives: tables of schema SAMPLES, that of test TEST, and how many rows were passed over for which reason."""

    sample: pa.Table
    training: dict[str, pa.Table]
    counts: Counts


def draw_samples(config: Config, folder: Folder, check: Callable[[], None]) -> Drawn:
    """Read and tokenise a target's data through Ray and draw its splits. The training splits are left in `data/` of a folder that
    all nodes see, each a table in parts.

    Args:
        check: raises where this process may not write the splits any more.

    Raises:
        InputError: a file is missing, malformed or empty, or has no usable completion.
    """
    attempt = f"{UNORDERED}/{uuid.uuid4().hex}"
    try:
        drawn = _draw(config, folder.sub(attempt), folder.sub("data"), check)
    finally:
        folder.delete(attempt)
    folder.delete(UNORDERED)  # with what attempts left that were killed
    return drawn


def take_samples(config: Config) -> Splits:
    """The same of a small target and on one machine, with the splits in memory."""
    with temporary_folder() as scratch:
        folder = Folder.at(str(scratch))
        drawn = draw_samples(config, folder, nobody_else)
        return Splits(drawn.sample, {role: folder.read_table(f"data/{role}.parquet") for role in ROLES}, drawn.counts)


def _draw(config: Config, folder: Folder, data: Folder, check: Callable[[], None]) -> Drawn:
    paths = target_paths(config)
    shards = Shards(folder, _tokenised(paths, config, folder))
    counts = {role: _counted(shards.reports, role) for role in paths}
    for role, path in paths.items():
        _require_usable(shards.reports, role, path, counts[role])
    draw = Draw(shards)
    found = {role: draw.total(role) for role in paths}
    _count_lost(found, paths, counts)
    cuts, contents = _cut(draw, found, config)
    n_search = _sample_size(contents, config)
    counts["train"]["repeated (trained on, sampled once)"] = cuts["train"].stop - cuts["train"].start - contents
    draw.write(cuts, data, check)
    sizes = {role: cuts[role].stop - cuts[role].start for role in ROLES}
    return Drawn(_search_sample(data, n_search, config), sizes, counts)


def _counted(reports: pa.Table, role: str) -> dict[str, int]:
    """How many rows were used, and how many passed over for which of the reasons that hold for most."""
    found: Counter[str] = Counter()
    for problems in _of_role(reports, role)["problems"].to_pylist():
        found.update(dict(problems))
    kept = {name: found.pop(name) for name in (USED, "malformed") if name in found}
    notes = {name: found.pop(name) for name in [*found] if name.startswith(USED_BUT)}
    return kept | shortened(found, MAX_PROBLEMS) | notes


def target_paths(config: Config) -> dict[str, str]:
    """The target's data, by its role.

    Raises:
        InputError: there is nothing at a path.
    """
    paths = config.target.paths
    folders = {role: Folder.at(path) for role, path in paths.items()}
    for role, folder in folders.items():
        if not _exists(folder, role):
            raise InputError(f"{paths[role]}: no such file or folder (target.{role})")
        if not any(size for _, size, _ in folder.state()):
            raise InputError(f"{paths[role]}: the data set is empty, or no file (target.{role})")
    files = {role: _files(paths[role], role) for role in paths}
    if twice := next((role for role in files if files[role] and [*files.values()].count(files[role]) > 1), None):
        raise InputError(f"{paths[twice]}: the same data for two splits (target.{twice}); give each rows of its own")
    return paths


def _files(path: str, role: str) -> list[str] | None:
    """The files that hold a split; None: `datasets` knows."""
    source = source_of(path, role)
    return None if source.folder.exists("dataset_dict.json") else [source.folder.join(name) for name in source.names]


def _exists(folder: Folder, role: str) -> bool:
    try:
        return folder.exists()
    except OSError as error:
        if is_transient(error):
            raise
        raise InputError(f"{folder.uri}: cannot be looked at (target.{role}; {one_line(error)})") from error


def reading_of(config: Config, role: str = "train") -> Reading:
    """How the rows of a role are read: with their choices where the test split is drawn from them, and is measured by these."""
    target = config.target
    longest = min(target.max_tokens, context_length(config.base) - 1)  # an engine generates a token behind a row
    gives_test = role == ("test" if target.test else "train")
    asks_choices = config.compare.metric in BY_CHOICES
    asks, size = gives_test and asks_choices, vocabulary(config.base)
    return Reading(longest, target.too_long, target.turns, dict(target.columns), asks, size)


def split_of(table: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return table.filter(pc.equal(table["split"], split))


def _tokenised(paths: dict[str, str], config: Config, folder: Folder) -> pa.Table:
    """The reports of shards with the usable rows of all files. One Ray Data execution reads them side by side."""
    load_tokenizer(config.base)  # an unknown base is the user's error, not a worker's
    options = {"folder": folder, "base": config.base, "seed": config.search.seed}
    given = {role: {"role": role, "reading": reading_of(config, role), **options} for role in paths}
    columns = list(config.target.columns.values())
    parts = [
        read_rows(path, role, columns).map_batches(tokenise_shard, batch_size=None, batch_format="pyarrow", fn_kwargs=given[role])
        for role, path in paths.items()
    ]
    shards = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    if sum(size for path in paths.values() for _, size, _ in Folder.at(path).state()) <= ONE_PROCESS:
        shards.context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=1)
    reports = shards.iter_batches(batch_format="pyarrow", batch_size=None)
    try:
        tables = [report.select(SHARDS.names).cast(SHARDS) for report in reports if report.num_rows]
    except (OSError, pa.ArrowException) as error:
        if is_transient(error):
            raise
        if harmed := next(filter(None, (unreadable(path, role, columns) for role, path in paths.items())), None):
            raise InputError(harmed) from error
        raise
    return pa.concat_tables(tables) if tables else SHARDS.empty_table()


def _of_role(rows: pa.Table, role: str) -> pa.Table:
    return rows.filter(pc.equal(rows["role"], role))


def _require_usable(reports: pa.Table, role: str, path: str, counts: Mapping[str, int]) -> None:
    """See to it that a file's rows can be used.

    Raises:
        InputError: a line is malformed, or no row can be used.
    """
    if counts.get("malformed"):
        told = _of_role(reports, role)
        lines = sum((Counter(dict(pairs)) for pairs in told["lines"].to_pylist()), Counter[int]())
        blocks = [block for malformed in told["malformed"].to_pylist() for block in malformed]
        where = first_malformed(path, role, lines, min(blocks)) if blocks else f"{path}: a row is not a JSON object"
        raise InputError(f"{where}; each line must be one JSON object, in UTF-8")
    if not counts:
        raise InputError(f"{path}: the data set is empty (target.{role})")
    if not counts.get("used"):
        reasons = ", ".join(f"{count} x {problem}" for problem, count in counts.items())
        raise InputError(f"{path}: no row can be used ({reasons}); rows need {FORMS}")


def _count_lost(found: Mapping[str, Found], paths: Mapping[str, str], counts: Counts) -> None:
    """Each content is in one split alone of those that were given: what is in several stays in test, or else in validation, so
    that nothing is measured on what was trained on. What the others lose is counted.

    Raises:
        InputError: too little is left of one.
    """
    for role in [role for role in reversed(ROLES) if role in found]:
        usable, kept, _ = found[role]
        if lost := usable - kept:
            later = [other for other in reversed(ROLES[ROLES.index(role) + 1 :]) if other in found]
            if kept < (LEAST_LEFT * usable if role == "train" else 1):
                others = " or ".join(f"{paths[other]} (target.{other})" for other in later)
                raise InputError(
                    f"{paths[role]}: {lost} of {usable} usable rows (target.{role}) are also in {others}; "
                    "give each split rows of its own, or none: validation and test are then split off from train"
                )
            counts[role]["used"] -= lost
            counts[role][f"also in {' or '.join(later)}"] = lost


def _cut(draw: Draw, found: Mapping[str, Found], config: Config) -> tuple[dict[str, Cut], int]:
    """train, validation and test; those not given are split off from train, whose rows they then no longer are in. And how many
    contents are left in train.

    Raises:
        InputError: none are.
    """
    target, (_, rows, contents) = config.target, found["train"]
    limits = {"validation": target.validation_rows, "test": target.test_rows}
    cuts = {role: Cut(role, 0, kept) for role, (_, kept, _) in found.items()}
    absent = [role for role in limits if role not in found]
    start, before = 0, 0
    for role in absent:
        cuts[role] = Cut("train", start, min(start + max(1, int(rows * SPLIT_OFF)), rows))
        # A content that is there several times stays on one side.
        start, before = draw.whole_contents("train", cuts[role].stop)
    if start == rows:
        raise InputError(
            f"{target.train}: {contents} distinct usable rows are too few to split {' and '.join(absent)} off; give more rows"
        )
    cuts["train"] = Cut("train", start, rows)
    limited = {role: Cut(cut.role, cut.start, min(cut.stop, cut.start + limits.get(role, rows))) for role, cut in cuts.items()}
    return limited, contents - before


def _sample_size(contents: int, config: Config) -> int:
    """Rows of the sample, which holds each content once.

    Raises:
        InputError: they are too few.
    """
    size = min(contents, config.search.samples)
    if size <= _holdout(size, config):
        raise InputError(f"{config.target.train}: {size} distinct usable rows are too few to search with; give more rows")
    return size


def _holdout(size: int, config: Config) -> int:
    return max(1, round(size * config.search.holdout))


def _search_sample(data: Folder, size: int, config: Config) -> pa.Table:
    """Rows of train, each content once; the last share is the hold-out."""
    sample = _first_in_files(data, size, config) if config.search.draw == "first" else _first_of_draw(data, size)
    split = ["search"] * (size - _holdout(size, config)) + ["holdout"] * _holdout(size, config)
    return sample.set_column(sample.column_names.index("split"), "split", pa.array(split)).cast(SAMPLES)


def _first_of_draw(data: Folder, size: int) -> pa.Table:
    """In the order of the draw, which is random."""
    drawn: list[pa.Table] = []
    missing, last = size, ""
    for rows in Parts(data, "train.parquet").batches(SAMPLES.names):
        ids = rows["sample_id"].to_numpy().astype(str)
        _, first = np.unique(ids, return_index=True)
        fresh = np.sort(first[ids[first] != last])[:missing]
        drawn.append(rows.take(fresh))
        missing, last = missing - len(fresh), ids[-1]
        if not missing:
            break
    return pa.concat_tables(drawn)


def _first_in_files(data: Folder, size: int, config: Config) -> pa.Table:
    """In the order of the files, of the rows that are in the split train: none that was split off."""
    rows = first_usable(config, replace(reading_of(config), choices=False))
    found: dict[str, dict[str, Any]] = {}
    while len(found) < size and (some := list(islice(rows, FIRST_AT_ONCE))):
        usable = {row["sample_id"]: row for row in some if row["sample_id"] not in found}
        kept = _in_train(data, list(usable))
        found |= {name: row for name, row in usable.items() if name in kept}
    return pa.Table.from_pylist([{"split": "search", **row} for row in found.values()][:size], schema=SAMPLES)


def first_usable(config: Config, reading: Reading, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The usable rows of target.train, tokenised, in the order of its files and without Ray.

    Args:
        most: rows that are looked at; None: all, as they are asked for.

    Raises:
        InputError: the file is of no known form, or cannot be read.
    """
    tokenizer = load_tokenizer(config.base)
    texts = first_rows(target_paths(config)["train"], "train", list(reading.columns.values()))
    rows = (tokenise_text(text, tokenizer, config.search.seed, reading) for text in islice(texts, most))
    return (row for row in rows if "problem" not in row)


def _in_train(data: Folder, ids: list[str]) -> set[str]:
    asked, found = pa.array(ids, pa.string()), set[str]()
    for rows in Parts(data, "train.parquet").batches(["sample_id"]):
        found.update(rows["sample_id"].filter(pc.is_in(rows["sample_id"], asked)).to_pylist())
    return found
