"""How far vLLM's losses on a base are from those of transformers and PEFT, for test_vllm_bases.py: an engine takes a process.

python tests/engines/proof.py BASE DTYPE      # prints the largest effect of an adapter on all layers, and the difference
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from pipeline.engines.canary import make_canary, prove, short_rows
from pipeline.engines.scorer import EngineConfig, build_scorer
from pipeline.model.base_model import linear_shapes, vocabulary
from pipeline.model.layer_names import is_of_text

LENGTHS = (9, 17, 30, 32)


def main(base: str, dtype: str) -> None:
    shapes, head = linear_shapes(base)
    leaves = {name.rpartition(".")[2] for name in shapes if name != head and is_of_text(name)}
    config = EngineConfig(base, dtype, 8, tuple(sorted(leaves)), 64, adapters_per_batch=2, kept_bytes=1 << 20)
    numbers = np.random.default_rng(0)
    ids = [numbers.integers(5, vocabulary(base) - 10, length).tolist() for length in LENGTHS]
    masks = [[place >= length // 2 for place in range(length)] for length in LENGTHS]
    rows = pa.table({"sample_id": list(map(str, LENGTHS)), "input_ids": ids, "completion_mask": masks})
    with TemporaryDirectory() as scratch:
        made = make_canary(config, short_rows(rows), Path(scratch))
        assert made is not None
        assert made.known_S is not None
        found = prove("vllm", build_scorer("vllm", config), config, made)
    print(json.dumps({"effect": float(np.abs(made.known_S - made.base_S).max()), "difference": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
