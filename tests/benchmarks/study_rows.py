"""Rows of the study's table that tests make up."""

from dataclasses import replace
from typing import Any

from benchmarks.study_arms import StudyArm

PLAIN = StudyArm(
    base="tiny",
    task="sums",
    init="base",
    seed=0,
    settings="s",
    inputs="i",
    kin=True,
    verdict="mashup",
    recipe="exact-1",
    donors="minus",
    overhead_seconds=50.0,
    charged_seconds=10.0,
    test_rows=100,
    machine="one",
    lr=5e-4,
    steps=(0.0, 10.0, 20.0),
    seconds=(0.0, 50.0, 100.0),
    validation_nll=(3.0, 2.0, 1.0),
    validation_token_accuracy=(0.1, 0.4, 0.6),
    validation_exact_match=(0.0, 0.3, 0.5),
    test_nll=1.1,
    test_token_accuracy=0.6,
    test_exact_match=0.5,
    test_answer_match=0.55,
)


def arm(**different: Any) -> StudyArm:
    """An arm from the base of 20 steps in 100 s, or what differs."""
    return replace(PLAIN, **different)


def mashup(**different: Any) -> StudyArm:
    """One that is at the base's final NLL after 10 of 20 steps, and at its final accuracy after 5."""
    faster = {"validation_nll": (2.0, 1.0, 0.9), "validation_token_accuracy": (0.5, 0.7, 0.8)}
    return arm(**{"init": "mashup", "test_exact_match": 0.7} | faster | different)


def absent(init: str, **different: Any) -> StudyArm:
    """A start that was asked for and that there is not."""
    empty: dict[str, Any] = dict.fromkeys(("lr", "test_nll", "test_token_accuracy", "test_exact_match", "test_answer_match"))
    curves = dict.fromkeys(("steps", "seconds", "validation_nll", "validation_token_accuracy", "validation_exact_match"), ())
    return arm(init=init, **empty | curves | different)
