"""Scores of what was written: as SQuAD compares answers, and by functions, which may be wrong in many ways."""

from collections.abc import Callable

import pytest

from pipeline.core.errors import InputError
from pipeline.train.scores import function_of, is_own, normalise, score, source_of

pytestmark = pytest.mark.timeout(60)

SHARE = "len(set(a.split()) & set(r.split())) / len(r.split()) for a, r in zip(answers, references)"


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("The  Eiffel\nTower.", "eiffel tower", True),
        ("an answer", "answer", True),
        ("Paris", "London", False),
        ("another", "other", False),
        ("<think>London?</think> Paris!", "paris", True),
        ("42", "4.2", False),
        ("-5", "5", False),
        ("1,000.", "1000", True),
        ("well-known", "wellknown", True),  # as SQuAD has it
        ("A", "(a)", False),  # of an answer that is nothing else all is left
        ("", "A", False),
        ("The", "A", False),
        ("A.", "a.", True),
    ],
)
def test_answers_are_compared_as_squad_compares_them(one: str, other: str, equal: bool) -> None:
    assert (normalise(one) == normalise(other)) is equal
    assert score("exact_match", ["?"], [one], [other]) == [float(equal)]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("no_such_module:f", "no_such_module cannot be imported .*PYTHONPATH"),
        ("own_metric:f", "own_metric has no function 'f'"),
        ("own_metric:number", "own_metric has no function 'number'"),
    ],
)
def test_a_function_that_is_not_there_is_named(named: str, message: str, module: Callable[[str], str]) -> None:
    module(SHARE)
    with pytest.raises(InputError, match=message) as refusal:
        function_of(named)
    assert "\n" not in str(refusal.value)


def test_a_function_gets_texts_and_gives_numbers(module: Callable[[str], str]) -> None:
    own = f"{module(SHARE)}:share"
    assert score(own, ["?", "?"], ["a b", "c"], ["a d", "c"]) == [0.5, 1.0]
    assert score(f"{module('len(p) for p in prompts')}:share", ["?", "??"], ["a", "b"], ["c", "d"]) == [1.0, 2.0]


def test_the_source_is_that_of_the_functions_module(module: Callable[[str], str]) -> None:
    own = f"{module(SHARE)}:share"
    assert SHARE in source_of(own)
    assert source_of("exact_match") == source_of("math:sqrt") == ""


@pytest.mark.parametrize(
    ("metric", "own"), [(None, False), ("choices", False), ("exact_match", False), ("lm_eval:arc", False), ("a.b:c", True)]
)
def test_a_function_is_told_from_other_metrics(metric: str | None, own: bool) -> None:
    assert is_own(metric) is own


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1.0", "gave 1 numbers for 2 rows; it must give one a row"),
        ("float('nan') for a in answers", "gave a number that is not finite"),
        ("'good' for a in answers", "failed .ValueError: could not convert"),
        ("a.missing for a in answers", "failed .AttributeError"),
    ],
)
def test_a_function_that_gives_something_else_is_refused(body: str, message: str, module: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        score(f"{module(body)}:share", ["?", "?"], ["a", "b"], ["a", "b"])
    assert "\n" not in str(refusal.value)


def test_a_function_that_gives_one_number_for_all_is_refused(module: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match=r"failed .TypeError"):
        score(f"{module(SHARE)}:one", ["?"], ["a"], ["a"])
