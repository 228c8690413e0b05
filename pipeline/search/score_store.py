"""Known scores, shared between runs and machines: `<folder>/<scope>/*.parquet`.

A score's key is the base model, the way of scoring (both in the scope), the adapter's content and the sample's content; none of
them is a name or a path. Files are only added, each written whole under a name of its own, so that writers cannot harm each
other; a row that two of them wrote is read once.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from pipeline.core.storage import Folder
from pipeline.core.tables import SCORING_FAILURES, STORED

T = TypeVar("T")

SCORING_VERSION = 3
"""To be raised by a change of the engines that changes scores. 3: no layer of a mixture is left out of an adapter."""

KEY = ["adapter_hash", "sample_id"]

MANY_FILES = 64
"""Files above which they are worth merging."""

AT_ONCE = 32
"""Files that are read or removed at the same time."""

READ_ATTEMPTS = 5


def new_name() -> str:
    """Of a file that nobody else writes."""
    return f"{uuid.uuid4().hex}.parquet"


@dataclass(frozen=True)
class Known:
    """What is known of N candidates on S samples. In `nll_NS`, NaN: no score; infinity: a loss that was no number. In `hits_NS`,
    NaN: no score, or the engine did not tell."""

    nll_NS: NDArray[np.float64]
    hits_NS: NDArray[np.float64]
    tokens_S: NDArray[np.int32]

    def ranked_by(self, measure: str) -> NDArray[np.float64]:
        """What a race adds up, the lower the better; shape (N, S), NaN and infinity as in `nll_NS`.

        Args:
            measure: as `search.rank_by`; with token_accuracy the tokens that were not the first choice are counted.
        """
        if measure == "nll":
            return self.nll_NS
        missed: NDArray[np.float64] = np.where(np.isinf(self.nll_NS), np.inf, self.tokens_S - self.hits_NS)
        return missed


@dataclass(frozen=True)
class ScoreStore:
    """The scores of one base model and one way of scoring."""

    folder: Folder

    @classmethod
    def at(cls, uri: str, fingerprint: str, engine: str, dtype: str) -> "ScoreStore":
        return cls(Folder.at(uri).sub(f"v{SCORING_VERSION}-{fingerprint}-{engine}-{dtype}"))

    def write(self, scores: pa.Table, hashes: Mapping[str, str], name: str | None = None) -> str:
        """Keep scores of schema SCORES. Gives the name of their file.

        Args:
            hashes: adapter_id -> adapter_hash.
            name: as of `new_name`; None: a new one.
        """
        name = name or new_name()
        column = pa.array([hashes[adapter] for adapter in scores["adapter_id"].to_pylist()], pa.string())
        self.folder.write_table(name, scores.append_column("adapter_hash", column).cast(STORED))
        return name

    def files(self) -> list[str]:
        """Names of the files that there are."""
        return self.folder.list_files(".parquet")

    def load(self, hashes: Sequence[str], samples: pa.Table) -> Known:
        """What is known of these adapters on these samples (schema SAMPLES), read file by file."""
        adapters, ids = pa.array(hashes, pa.string()), samples["sample_id"].combine_chunks()
        tokens = [sum(mask[1:]) for mask in samples["completion_mask"].to_pylist()]
        known = Known(
            np.full((len(adapters), len(ids)), np.nan),
            np.full((len(adapters), len(ids)), np.nan),
            np.array(tokens, np.int32),
        )
        wanted = pc.is_in(pc.field("sample_id"), ids) & pc.is_in(pc.field("adapter_hash"), adapters)

        def read(stored: pads.Dataset) -> None:
            for batch in stored.to_batches(filter=wanted):
                rows, columns = pc.index_in(batch["adapter_hash"], adapters), pc.index_in(batch["sample_id"], ids)
                cells = rows.to_numpy(), columns.to_numpy()
                known.nll_NS[cells] = np.nan_to_num(batch["nll_sum"].to_numpy(), nan=np.inf, posinf=np.inf)
                known.hits_NS[cells] = batch["n_correct"].to_numpy(zero_copy_only=False)

        self._read(read)
        return known

    def losses_by_sample(self, hashes: Sequence[str], at_least: int, most: int, but: Sequence[str]) -> NDArray[np.float64]:
        """Losses in nats a token of N adapters on those samples that `at_least` of them were scored on, shape (N, M); NaN where
        one was not. Of more than `most` such samples those that the most were scored on.

        Args:
            but: ids of samples to leave out.
        """
        adapters = pa.array(hashes, pa.string())
        wanted = pc.is_in(pc.field("adapter_hash"), adapters) & ~pc.is_in(pc.field("sample_id"), pa.array(but, pa.string()))
        counts = self._read(lambda stored: _count(stored, wanted))
        samples = [sample for sample, count in counts.most_common(most) if count >= max(1, at_least)]
        found = np.full((len(adapters), len(samples)), np.nan)
        ids = pa.array(samples, pa.string())

        def read(stored: pads.Dataset) -> None:
            for batch in stored.to_batches(filter=wanted & pc.is_in(pc.field("sample_id"), ids)):
                cells = pc.index_in(batch["adapter_hash"], adapters).to_numpy(), pc.index_in(batch["sample_id"], ids).to_numpy()
                found[cells] = batch["nll_sum"].to_numpy() / batch["n_tokens"].to_numpy()

        self._read(read)
        return np.where(np.isfinite(found), found, np.nan)

    def mean_losses(self, samples: pa.Table) -> pa.Table:
        """Columns adapter_hash and known_nll: the mean NLL a token of each adapter that was scored on some of these samples."""
        wanted = pc.is_in(pc.field("sample_id"), samples["sample_id"].combine_chunks())
        rows = self._read(lambda stored: stored.to_table(["adapter_hash", "nll_sum", "n_tokens"], filter=wanted))
        sums = rows.group_by("adapter_hash").aggregate([("nll_sum", "sum"), ("n_tokens", "sum")])
        return pa.table(
            [sums["adapter_hash"], pc.divide(sums["nll_sum_sum"], sums["n_tokens_sum"])], ["adapter_hash", "known_nll"]
        )

    def merge_files(self) -> None:
        """Make one file of many. What another run merges at the same time is then there twice, and read once."""
        names = self.files()
        if len(names) < MANY_FILES:
            return
        try:
            with ThreadPoolExecutor(AT_ONCE) as threads:
                table = pa.concat_tables(threads.map(self.folder.read_table, names))
        except (FileNotFoundError, pa.ArrowInvalid):
            return  # another run is at it, or a file is cut short
        values = [name for name in STORED.names if name not in KEY]
        rows = table.group_by(KEY, use_threads=False).aggregate([(name, "first") for name in values])
        merged = rows.rename_columns([name.removesuffix("_first") for name in rows.column_names])
        self.folder.write_table(new_name(), merged.select(STORED.names).cast(STORED))
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(self.folder.delete, names))

    def _read(self, read: Callable[[pads.Dataset], T]) -> T:
        """Read the files that there are, and again where another run has just merged them."""
        whole = False
        for _ in range(READ_ATTEMPTS - 1):
            try:
                return read(self.folder.dataset(STORED, whole))
            except FileNotFoundError:
                continue
            except pa.ArrowInvalid:  # a file is cut short: its scores are lost, and made again
                whole = True
        return read(self.folder.dataset(STORED, whole=True))


def _count(stored: pads.Dataset, wanted: pc.Expression) -> Counter[str]:
    """How many rows there are of each sample."""
    counts = Counter[str]()
    for batch in stored.to_batches(["sample_id"], filter=wanted):
        for one in pc.value_counts(batch["sample_id"]).to_pylist():
            counts[one["values"]] += one["counts"]
    return counts


class News:
    """What other runs add to a store while a race goes on, so that what one has just made no other makes again."""

    def __init__(self, store: ScoreStore, samples: pa.Table) -> None:
        """
        Args:
            samples: of the race.
        """
        self._store, self._samples = store, samples["sample_id"].combine_chunks()
        self._read = set(store.files())

    def take(self, own: Iterable[str]) -> pa.Table:
        """The scores, of schema STORED and on the race's samples, in files that have come since.

        Args:
            own: names of files that the race wrote itself.
        """
        names = set(self._store.files()) - self._read - set(own)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = pa.concat_tables([STORED.empty_table(), *threads.map(self._of_race, sorted(names))])
        self._read |= names  # only now: what could not be read is read the next time
        return found

    def _of_race(self, name: str) -> pa.Table:
        try:
            stored = self._store.folder.read_table(name)
        except (FileNotFoundError, pa.ArrowInvalid):  # another run has just merged it, or it is cut short
            return STORED.empty_table()
        return stored.filter(pc.is_in(stored["sample_id"], self._samples)).select(STORED.names).cast(STORED)


def record_failures(folder: Folder, failures: dict[str, str]) -> None:
    """Keep why adapters could not be scored: adapter_id -> reason."""
    if failures:
        rows = pa.table([list(failures), list(failures.values())], schema=SCORING_FAILURES)
        folder.write_table(new_name(), rows)


def forget_failures(folder: Folder, reason: str) -> None:
    """Drop the adapters that could not be scored for this reason, which may not hold any more."""
    found = read_failures(folder)
    kept = {name: why for name, why in found.items() if why != reason}
    if len(kept) < len(found):
        folder.delete("")
        record_failures(folder, kept)


def read_failures(folder: Folder) -> dict[str, str]:
    """adapter_id -> why it could not be scored."""
    table = folder.dataset(SCORING_FAILURES).to_table()
    return dict(zip(*(table[name].to_pylist() for name in SCORING_FAILURES.names), strict=True))
