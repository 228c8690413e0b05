"""A leaderboard and a catalogue for tests."""

import pyarrow as pa

from pipeline.core.tables import BASE_ID, CATALOGUE, LEADERBOARD


def leaderboard(*rows: tuple[str, float, float]) -> pa.Table:
    """Rows of (adapter, search difference to the base, hold-out difference), the base among them."""
    ranked = sorted([*rows, (BASE_ID, 0.0, 0.0)], key=lambda row: row[1])
    return pa.Table.from_pylist(
        [
            {"place": place, "adapter_id": name, "nll": 2 + search, "nll_minus_base": search, "holdout_nll_minus_base": held}
            for place, (name, search, held) in enumerate(ranked, start=1)
        ],
        schema=LEADERBOARD,
    )


def catalogue(**ranks: int) -> pa.Table:
    plain = {"base_model": None, "alpha": 16.0, "use_rslora": False, "target_modules": ["q_proj"], "status": "ok"}
    rows = [
        {"adapter_id": name, "uri": f"/pool/{name}", "sha256": name * 4, "rank": rank, **plain} for name, rank in ranks.items()
    ]
    return pa.Table.from_pylist(rows, schema=CATALOGUE)


BOARD = leaderboard(("a", -0.5, -0.4), ("b", -0.4, 0.1), ("c", -0.3, -0.2), ("d", -0.1, -0.3), ("e", 0.2, -0.5))


POOL = catalogue(a=4, b=8, c=16, d=2, e=4)
