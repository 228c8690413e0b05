"""Scores of answers that were written: `exact_match`, or a function of the user's, `package.module:function`.

    function(prompts, answers, references) -> one finite number a row, the higher the better; from three lists of texts

It runs in the process of the command, whose Python must find its module.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable
from importlib import import_module

from pipeline.config import HARNESS
from pipeline.core.errors import InputError, one_line

Function = Callable[[list[str], list[str], list[str]], Iterable[float]]

PUNCTUATION = re.compile(r"(?P<number>(?<!\w)-(?=\d)|(?<=\d)\.(?=\d))|[!-/:-@\[-`{-~]")
"""In ASCII, as SQuAD's evaluation has it; a minus sign and a decimal point of a `number` are none."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
THOUGHTS_END = "</think>"


def is_own(metric: str | None) -> bool:
    """Whether a metric is a function of the user's."""
    return metric is not None and ":" in metric and not metric.startswith(HARNESS)


def function_of(metric: str) -> Function:
    """
    Raises:
        InputError: there is no such module, or no such function in it.
    """
    module, _, name = metric.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except Exception as error:  # whatever the module does
        where = "PYTHONPATH names folders with modules"
        raise InputError(f"compare.metric: {module} cannot be imported ({one_line(error)}); {where}") from error
    if not callable(found):
        raise InputError(f"compare.metric: {module} has no function {name!r}")
    function: Function = found
    return function


def source_of(metric: str) -> str:
    """The text of the module that a function is defined in; empty where there is none to be read, and for `exact_match`."""
    if not is_own(metric):
        return ""
    function = function_of(metric)
    try:
        return inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        return ""


def score(metric: str, prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
    """A number for each answer: 1 or 0 for `exact_match`, or what the function gives.

    Raises:
        InputError: it fails, or gives something else than one finite number a row.
    """
    if not is_own(metric):
        return [float(normalise(one) == normalise(other)) for one, other in zip(answers, references, strict=True)]
    try:
        scores = [float(one) for one in function_of(metric)(prompts, answers, references)]
    except Exception as error:  # it is the user's
        raise InputError(f"compare.metric: {metric} failed ({one_line(error)})") from error
    if len(scores) != len(answers):
        raise InputError(f"compare.metric: {metric} gave {len(scores)} numbers for {len(answers)} rows; it must give one a row")
    if not all(map(math.isfinite, scores)):
        raise InputError(f"compare.metric: {metric} gave a number that is not finite")
    return scores


def normalise(text: str) -> str:
    """As SQuAD's evaluation does it: lower case, without punctuation, articles and repeated blanks; but numbers keep their signs,
    and an answer that is nothing else, such as `A`, is left. What was thought before the answer is no part of it."""
    whole = text.rpartition(THOUGHTS_END)[2].lower()
    said = PUNCTUATION.sub(lambda match: match["number"] or "", whole)
    return " ".join(ARTICLES.sub(" ", said).split()) or " ".join(whole.split())
