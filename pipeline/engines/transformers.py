"""The portable scoring engine: transformers and PEFT, one adapter after the other. The oracle of the tests."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.adapters.adapter import for_engine, put_on
from pipeline.adapters.saved_layers import trained_layers
from pipeline.adapters.validation import read_declared
from pipeline.adapters.whole_layers import changed
from pipeline.core.file_names import WEIGHTS_FILE
from pipeline.core.node_folder import temporary_folder
from pipeline.core.tables import SCORES
from pipeline.engines.scorer import Candidate, EngineConfig, Loaded
from pipeline.model.base_model import device, fast_dtype, load_model
from pipeline.model.completion_loss import collate, decoder_of, score_rows
from pipeline.model.length_batches import length_batches

BATCH_TOKENS = 2048
"""Padded tokens in one forward pass."""


class TransformersScorer:
    """Holds the base model; an adapter is put on, scored and taken off again."""

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.loaded = config, Loaded()
        self._load()

    def load_ahead(self, candidate: Candidate) -> None:
        """PEFT reads an adapter where it puts it on the model, which is being used meanwhile."""

    def let_go_first(self, folders: Collection[Path]) -> None:
        """None is kept."""

    def score(self, candidates: Sequence[Candidate], samples: pa.Table) -> pa.Table:
        return pa.concat_tables([self._score(candidate, samples) for candidate in candidates])

    def _load(self) -> None:
        self.model = load_model(self.config.base, fast_dtype(self.config.dtype))
        decoder_of(self.model)  # found out now, while no adapter is on it

    def _score(self, candidate: Candidate, samples: pa.Table) -> pa.Table:
        if candidate.folder is None:
            return self._score_rows(candidate.adapter_id, samples)
        try:
            with (
                self.loaded.reading(candidate.folder / WEIGHTS_FILE),
                temporary_folder() as scratch,
            ):
                changes = trained_layers(candidate.folder, read_declared(candidate.folder), self.config.base)
                adapted = put_on(self.model, for_engine(candidate.folder, scratch), self.config.base).eval()
        except Exception:
            self._load()  # what PEFT had put into the layers before it failed would be scored with the next one
            raise
        try:
            with changed(self.model, changes):
                return self._score_rows(candidate.adapter_id, samples)
        finally:
            adapted.unload()

    def _score_rows(self, adapter_id: str, samples: pa.Table) -> pa.Table:
        ids, masks = samples["input_ids"].to_pylist(), samples["completion_mask"].to_pylist()
        found: list[tuple[float, int, int]] = [(0.0, 0, 0)] * len(ids)
        for rows in length_batches([len(row) for row in ids], BATCH_TOKENS):
            batch = collate([ids[row] for row in rows], [masks[row] for row in rows], device())
            for row, nll, count, hits in zip(rows, *score_rows(self.model, batch), strict=True):
                found[row] = (float(nll), int(count), int(hits))
        nll_sum, n_tokens, n_correct = zip(*found, strict=True)
        columns = [[adapter_id] * len(ids), samples["sample_id"], nll_sum, n_tokens, n_correct]
        return pa.table([pa.array(c) if not isinstance(c, pa.ChunkedArray) else c for c in columns], names=SCORES.names).cast(
            SCORES
        )
