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


def test_a_line_is_not_repeated_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that is offered every second for a minute, a line at first and one half a minute later; a new text in between."""
    clock = 1000.0
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: clock)
    progress = Progress()
    for second in range(60):
        clock = 1000.0 + second
        progress.now_and_then("5 scored" if second < 50 else "9 scored")
    lines = [line.split()[-2] for line in capsys.readouterr().err.strip().splitlines()]
    assert lines == ["5", "5", "9"]
