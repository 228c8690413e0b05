"""Target data -> tokenised splits: a small sample to search with, and the training splits.

Which rows are drawn depends on their content and the seed alone, not on their order or on how Ray splits the files: each
row has a place, the hash of seed and content, and the draw takes the lowest places.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.core.errors import InputError, is_transient, one_line
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES
from pipeline.data.readers import first_malformed, read_rows, unreadable
from pipeline.data.tokenise import TOKENISED, tokenise_batch
from pipeline.model.base_model import context_length, load_tokenizer

ROLES = ("train", "validation", "test")
SPLIT_OFF = 0.1
"""Share of the train rows that becomes a validation or test split that was not given."""

LEAST_LEFT = 0.5
"""Share of the train rows that must be in no other split that was given; where fewer are, one file was taken for another."""


MAX_PROBLEMS = 10
"""Reasons to pass rows over that are told apart."""


@dataclass(frozen=True)
class Splits:
    """What a target gives: tables of schema SAMPLES, and how many rows were passed over for which reason."""

    search: pa.Table
    training: dict[str, pa.Table]
    counts: dict[str, dict[str, int]]


def take_samples(config: Config) -> Splits:
    """Read and tokenise a target's data through Ray Data and draw its splits.

    Raises:
        InputError: a file is missing, malformed or empty, or has no usable completion.
    """
    paths = target_paths(config)
    rows = _tokenised(paths, config)
    counts = {role: _counted(_of_role(rows, role)["problem"].fill_null("used").to_pylist()) for role in paths}
    usable = {role: _usable(rows, role, path, counts[role]) for role, path in paths.items()}
    training = _training_splits(_disjoint(usable, paths, counts), config)
    return Splits(_search_sample(training["train"], config, counts["train"]), training, counts)


def _counted(problems: list[str]) -> dict[str, int]:
    """How many rows were used, and how many passed over for which of the reasons that hold for most."""
    found = Counter(problems)
    kept = {name: found.pop(name) for name in ("used", "malformed") if name in found}
    common = dict(found.most_common(MAX_PROBLEMS))
    others = found.total() - sum(common.values())
    return kept | common | ({"other reasons": others} if others else {})


def target_paths(config: Config) -> dict[str, str]:
    """The target's data, by its role.

    Raises:
        InputError: there is nothing at a path.
    """
    paths = {role: path for role in ROLES if (path := getattr(config.target, role)) is not None}
    folders = {role: Folder.at(path) for role, path in paths.items()}
    for role, folder in folders.items():
        if not _exists(folder, role):
            raise InputError(f"{paths[role]}: no such file or folder (target.{role})")
        if not any(size for _, size, _ in folder.state()):
            raise InputError(f"{paths[role]}: the data set is empty, or no file (target.{role})")
    places = {role: folder.path for role, folder in folders.items() if not folder.exists("dataset_dict.json")}
    if twice := next((role for role in places if list(places.values()).count(places[role]) > 1), None):
        raise InputError(f"{paths[twice]}: the same data for two splits (target.{twice}); give each rows of its own")
    return paths


def _exists(folder: Folder, role: str) -> bool:
    try:
        return folder.exists()
    except OSError as error:
        if is_transient(error):
            raise
        raise InputError(f"{folder.uri}: cannot be looked at (target.{role}; {one_line(error)})") from error


def split_of(table: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return table.filter(pc.equal(table["split"], split))


def _tokenised(paths: dict[str, str], config: Config) -> pa.Table:
    """All rows of all files. One Ray Data execution reads them side by side."""
    load_tokenizer(config.base)  # an unknown base is the user's error, not a worker's
    longest = min(config.target.max_tokens, context_length(config.base) - 1)  # an engine generates a token behind a row
    options = {"base": config.base, "seed": config.search.seed, "max_tokens": longest}
    parts = [
        read_rows(path, role).map_batches(tokenise_batch, batch_format="pyarrow", fn_kwargs={"role": role, **options})
        for role, path in paths.items()
    ]
    rows = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    batches = rows.iter_batches(batch_format="pyarrow", batch_size=None)
    try:
        tables = [batch.select(TOKENISED.names).cast(TOKENISED) for batch in batches if batch.num_rows]
    except (OSError, pa.ArrowException) as error:
        if harmed := next(filter(None, map(unreadable, paths.values())), None):
            raise InputError(harmed) from error
        raise
    return pa.concat_tables(tables) if tables else TOKENISED.empty_table()


def _of_role(rows: pa.Table, role: str) -> pa.Table:
    return rows.filter(pc.equal(rows["role"], role))


def _usable(rows: pa.Table, role: str, path: str, counts: dict[str, int]) -> pa.Table:
    """A file's usable rows in the order of their places.

    Raises:
        InputError: a line is malformed, or no row can be used.
    """
    if counts.get("malformed"):
        raise InputError(f"{first_malformed(path)}; each line must be one JSON object, in UTF-8")
    if not counts:
        raise InputError(f"{path}: the data set is empty (target.{role})")
    usable = _of_role(rows, role).filter(pc.is_null(_of_role(rows, role)["problem"]))
    if not len(usable):
        reasons = ", ".join(f"{count} x {problem}" for problem, count in counts.items())
        raise InputError(f"{path}: no row can be used ({reasons}); rows need messages, or prompt and completion")
    return usable.sort_by([("place", "ascending")])


def _disjoint(usable: dict[str, pa.Table], paths: dict[str, str], counts: dict[str, dict[str, int]]) -> dict[str, pa.Table]:
    """The splits that were given, each content in one alone: what is in several stays in test, or else in validation, so that
    nothing is measured on what was trained on. What they lose is counted.

    Raises:
        InputError: too little is left of one.
    """
    kept: dict[str, pa.Table] = {}
    for role in [role for role in reversed(ROLES) if role in usable]:
        rows = usable[role]
        taken = pa.chunked_array([table["sample_id"].combine_chunks() for table in kept.values()], pa.string())
        left = rows.filter(pc.invert(pc.is_in(rows["sample_id"], taken.combine_chunks())))
        if lost := len(rows) - len(left):
            if len(left) < (LEAST_LEFT * len(rows) if role == "train" else 1):
                others = " or ".join(f"{paths[other]} (target.{other})" for other in kept)
                raise InputError(
                    f"{paths[role]}: {lost} of {len(rows)} usable rows (target.{role}) are also in {others}; "
                    "give each split rows of its own, or none: validation and test are then split off from train"
                )
            counts[role]["used"] -= lost
            counts[role][f"also in {' or '.join(kept)}"] = lost
        kept[role] = left
    return kept


def _training_splits(usable: dict[str, pa.Table], config: Config) -> dict[str, pa.Table]:
    """train, validation and test; those not given are split off from train, whose rows they then no longer are in."""
    target = config.target
    splits = dict(usable)
    limits = {"validation": target.validation_rows, "test": target.test_rows}
    absent = [role for role in limits if role not in usable]
    train = usable["train"]
    size = max(1, int(len(train) * SPLIT_OFF))
    for role in absent:
        splits[role] = train.slice(0, size)
        # Not slice(size): a content that is there several times stays on one side.
        train = train.filter(pc.invert(pc.is_in(train["sample_id"], splits[role]["sample_id"].combine_chunks())))
    if not len(train):
        rows = pc.count_distinct(usable["train"]["sample_id"]).as_py()
        raise InputError(
            f"{target.train}: {rows} distinct usable rows are too few to split {' and '.join(absent)} off; give more rows"
        )
    splits["train"] = train
    return {role: _as_samples(splits[role].slice(0, limits.get(role)), role) for role in ROLES}


def _search_sample(train: pa.Table, config: Config, counts: dict[str, int]) -> pa.Table:
    """The first rows of train in the order of their places, each content once; the last share is the hold-out."""
    _, first = np.unique(np.array(train["sample_id"]), return_index=True)
    counts["repeated (trained on, sampled once)"] = len(train) - len(first)
    drawn = train.take(np.sort(first)[: config.search.samples])
    holdout = max(1, round(len(drawn) * config.search.holdout))
    if len(drawn) <= holdout:
        raise InputError(f"{config.target.train}: {len(drawn)} distinct usable rows are too few to search with; give more rows")
    split = ["search"] * (len(drawn) - holdout) + ["holdout"] * holdout
    return drawn.set_column(drawn.column_names.index("split"), "split", pa.array(split))


def _as_samples(rows: pa.Table, split: str) -> pa.Table:
    return rows.append_column("split", pa.array([split] * len(rows), pa.string())).select(SAMPLES.names)
