"""Which modules a config means: names and a stranger's regular expressions, by PEFT's rules and within a time limit."""

import math
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import regex
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from pipeline.core.errors import AdapterError
from pipeline.model.base_model import Shapes
from pipeline.model.layer_names import is_of_text

MAX_PATTERN = 2000
"""Characters of a regular expression."""
MAX_REPEATED = 100_000
"""Characters of a regular expression times what its counts, as in a{3}, multiply them by: a compiled one has as many nodes."""
PLAIN_PATH = re.compile(r"[\w.]+")
"""A pattern that is a module's path, or the end of one."""
ANOTHER_MEANING = re.compile(r"\{[^\d,}]|\[:")
"""Fuzzy matches and classes of POSIX, which `regex` has and Python's `re`, PEFT's, reads as plain characters."""
FLAGS = re.compile(r"\(\?[a-zA-Z-]*[ix]")
"""Of verbose mode, and of one without case, in which sets of signs take long to compile."""
COUNT = re.compile(r"\{(\d+)", re.ASCII)
MATCH_SECONDS = 1.0
"""For the patterns of a field together."""


def own_scales(config: LoraConfig, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each module, where any pattern names one: by PEFT's rule, the first key that matches the end of the path.

    Raises:
        AdapterError: a pattern is none, is too large, or takes too long.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    if not (ranks or alphas):
        return {}
    rank_of, alpha_of = _Patterns("rank_pattern", ranks, ends=True), _Patterns("alpha_pattern", alphas, ends=True)
    return {
        module: (int(rank_of.first(module, config.r)), float(alpha_of.first(module, config.lora_alpha))) for module in modules
    }


def targets(config: LoraConfig, shapes: Shapes, head: str | None) -> set[str]:
    """The linear layers that a config's target_modules name, by PEFT's own rules; not the output head.

    Raises:
        AdapterError: a pattern is none, is too large, or takes too long.
    """
    names = set(shapes) - {head}
    found = names if config.target_modules == "all-linear" else _matching("target_modules", config.target_modules, names)
    if config.exclude_modules:
        found = found - _matching("exclude_modules", config.exclude_modules, names)
    if config.layers_to_transform is None:
        return found
    used = set(config.target_modules) & {tail for name in found for tail in tails(name)}
    layers = replace(config, target_modules=used, exclude_modules=None)
    return {name for name in found if check_target_module_exists(layers, name)}


def text_layers(names: Collection[str], shapes: Shapes) -> list[str]:
    """The linear layers of text that paths, or ends of paths, name."""
    wanted = set(names)
    return [name for name in shapes if is_of_text(name) and not wanted.isdisjoint(tails(name))]


def _matching(field: str, asked: Any, names: set[str]) -> set[str]:
    """Those that a regular expression matches, or that end in one of several names."""
    if isinstance(asked, str):
        patterns = _Patterns(field, {asked: True})
        return {name for name in names if patterns.first(name, False)}
    wanted = set(asked)
    return {name for name in names if not wanted.isdisjoint(tails(name))}


def _fits(path: str, name: str, ends: bool) -> bool:
    """Whether a plain path, in which a dot stands for any sign as in every regular expression, matches a whole name or, with
    `ends`, its end from a dot on."""
    start = len(name) - len(path)
    if not name.endswith(path.rpartition(".")[2]):  # most paths of a config name other modules
        return False
    if start < 0 or (start and not (ends and name[start - 1] == ".")):
        return False
    return all(asked in (".", found) for asked, found in zip(path, name[start:], strict=True))


def tails(name: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


class _Patterns:
    """A stranger's regular expressions, for full matches, within MATCH_SECONDS of CPU time altogether."""

    def __init__(self, field: str, table: Mapping[str, Any], ends: bool = False) -> None:
        """`ends`: a pattern may match the end of a path, from a dot on."""
        self._field, self._ends, self._until = field, ends, time.thread_time() + MATCH_SECONDS
        self._table = [(pattern, self._compile(pattern), value) for pattern, value in table.items()]

    def first(self, name: str, default: Any) -> Any:
        """The value of the first pattern that matches."""
        if self._table:
            self._left(self._table[0][0])
        for pattern, compiled, value in self._table:
            if self._fits(pattern, compiled, name):
                return value
        return default

    def _fits(self, pattern: str, compiled: Any, name: str) -> bool:
        if compiled is None:
            return _fits(pattern, name, self._ends)
        try:
            return bool(compiled.fullmatch(name, timeout=self._left(pattern)))
        except TimeoutError as error:
            raise self._too_slow(pattern) from error

    def _left(self, pattern: str) -> float:
        left = self._until - time.thread_time()
        if left <= 0:
            raise self._too_slow(pattern)
        return left

    def _compile(self, pattern: str) -> Any:
        """The regular expression. None: it is a plain path. A config may name each of a thousand modules by its path, and to
        compile all of these would take a slow machine longer than MATCH_SECONDS."""
        self._left(pattern)
        if len(pattern) > MAX_PATTERN:
            raise AdapterError(
                f"corrupt config: {self._field} has a pattern of {len(pattern)} characters; {MAX_PATTERN} are allowed"
            )
        if PLAIN_PATH.fullmatch(pattern):
            return None
        repeats = math.prod(max(1, int(count)) for count in COUNT.findall(pattern))
        if FLAGS.search(pattern) or len(pattern) * repeats > MAX_REPEATED:
            raise AdapterError(f"corrupt config: {self._field} {pattern!r} repeats too much, or sets a flag")
        if ANOTHER_MEANING.search(pattern):
            raise AdapterError(f"corrupt config: {self._field} {pattern!r} means other things to other readers")
        try:
            re.compile(pattern)  # what Python does not accept, PEFT would not
            return regex.compile(rf"(.*\.)?({pattern})" if self._ends else pattern)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"corrupt config: {self._field} {pattern!r} is no regular expression ({error})") from error

    def _too_slow(self, pattern: str) -> AdapterError:
        return AdapterError(f"corrupt config: {self._field} {pattern!r} takes more than {MATCH_SECONDS:g} s to match")
