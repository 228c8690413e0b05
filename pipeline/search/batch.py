"""What travels through the stream of a search: batches of work to the engines, and what became of them back to the race."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.core.tables import BASE_ID, CANDIDATES
from pipeline.engines.scorer import Loaded


def candidates_table(names: Sequence[str], uris: Sequence[str | None], hashes: Sequence[str]) -> pa.Table:
    """Of schema CANDIDATES, where the state of the files is not known."""
    return pa.Table.from_arrays([*map(pa.array, (names, uris, hashes)), pa.nulls(len(names))], CANDIDATES.names).cast(CANDIDATES)


def with_base(adapters: pa.Table) -> pa.Table:
    """The base, and after it these adapters (columns CANDIDATES); of schema CANDIDATES."""
    return pa.concat_tables([candidates_table([BASE_ID], [None], [BASE_ID]), adapters.select(CANDIDATES.names)])


@dataclass(frozen=True)
class Batch:
    """Adapters, and the samples that each of them is to be scored on.

    `candidates` is of schema CANDIDATES, `samples` of SAMPLES.
    """

    race: int
    number: str
    """Of no other batch, of whatever race or dispatcher."""
    stage: str
    """Of the run that asks, for the engines' logs."""
    alone: bool
    """Whether an engine is to do nothing else meanwhile, as one died with these adapters before."""
    candidates: pa.Table
    samples: pa.Table

    def to_block(self) -> pa.Table:
        """A block of one row, which Ray Data never cuts."""
        told = {"race": [self.race], "number": [self.number], "stage": [self.stage], "alone": [self.alone]}
        return pa.table({**told, "candidates": _as_one_value(self.candidates), "samples": _as_one_value(self.samples)})

    @classmethod
    def from_block(cls, block: pa.Table) -> "Batch":
        told = block.select(["race", "number", "stage", "alone"]).to_pylist()[0]
        return cls(**told, candidates=_as_table(block["candidates"]), samples=_as_table(block["samples"]))


@dataclass(frozen=True)
class Begun:
    """What an engine is told when it begins a batch."""

    wanted: pa.Table
    """Of schema CANDIDATES: the adapters that it is to score."""
    stopped: list[str]
    """URIs of adapters of this race, new to this engine, that will not be scored again."""


NOTHING = Begun(CANDIDATES.empty_table(), [])
"""For an engine that begins what nobody waits for any more."""


@dataclass(frozen=True)
class Report:
    """What an engine made of a batch."""

    race: int
    number: str
    """Of the batch."""
    scores: pa.Table
    """Of schema SCORES, on the batch's samples."""
    failures: dict[str, str] = field(default_factory=dict)
    """adapter_id -> why it is set aside."""
    tokens: int = 0
    """Input tokens that the engine read."""
    seconds: float = 0.0
    """Spent scoring."""
    waited: float = 0.0
    """Seconds in which the engine had nothing to score, as the adapters of this batch were still being read."""
    loaded: Loaded = field(default_factory=Loaded)
    """Adapters that it has read since its last report."""
    warm: bool = True
    """Whether it had scored a batch of adapters before."""


def _as_one_value(table: pa.Table) -> pa.ListArray:
    rows = pa.concat_arrays(table.to_struct_array().chunks) if len(table) else pa.array([], pa.struct(list(table.schema)))
    return pa.ListArray.from_arrays(pa.array([0, len(table)], pa.int32()), rows)


def _as_table(value: pa.ChunkedArray) -> pa.Table:
    return pa.Table.from_struct_array(value.combine_chunks().flatten())
