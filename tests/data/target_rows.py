"""Rows of a target for tests."""

from typing import Any

Row = dict[str, Any]


def rows(n: int, start: int = 0) -> list[Row]:
    return [{"prompt": f"What is {i} plus {i}?", "completion": f"The sum is {2 * i}."} for i in range(start, start + n)]


def as_messages(row: Row) -> Row:
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
