"""What tests of single adapters share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.model.base_model import Shapes, linear_shapes


@pytest.fixture(scope="module")
def base_layers(tiny_base: str) -> tuple[Shapes, str | None]:
    return linear_shapes(tiny_base)


@pytest.fixture
def good(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> Path:
    """A valid adapter that a test may spoil."""
    return make_adapter(tmp_path / "good", tiny_base)
