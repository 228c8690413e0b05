"""The trace that a finetuning leaves of its first steps."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.core.storage import Folder
from pipeline.train.arm import Job
from pipeline.train.loop import Finetuning
from pipeline.train.profiler import STEPS


def test_a_profile_is_a_trace_of_the_first_steps(job: Callable[..., Job], tmp_path: Path) -> None:
    arm = replace(job(steps=6, evaluations=1), profile=Folder.at(tmp_path / "profile"))
    Finetuning(arm, 0, 1, lambda metrics, snapshot: None).run()
    trace = json.loads(gzip.decompress((tmp_path / "profile" / arm.trace).read_bytes()))
    events = [event["name"] for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in events) == STEPS
    assert "aten::mm" in events
