"""Progress: lines on standard error, and not too many of them."""

import pytest

from pipeline.progress import Progress


def test_a_counter_says_its_first_and_its_last_step_and_little_between(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.stage("search")
    for done in range(1, 101):
        progress.count(done, 100, "adapters [scored]")
    written = capsys.readouterr()
    lines = written.err.strip().splitlines()
    assert written.out == ""
    assert 2 <= len(lines) <= 4
    assert "search" in lines[0]
    assert lines[-1].endswith("100 of 100 adapters [scored]")
