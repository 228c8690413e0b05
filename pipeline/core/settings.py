"""A config file and its sections: keys are known, values checked, and messages name the file, the key and its value."""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from pipeline.core.errors import InputError, for_display
from pipeline.core.storage import NO_SECRET, has_secret, without_secret

MAX_BYTES = 1 << 20
"""Of a config file."""

MAX_KEYS = 10_000
"""Of a mapping in YAML, those that it merges in counted as often as they come."""

ODD_NUMBER = re.compile(r"[-+]?(0\d|.*:)")
"""What YAML 1.1 takes for an octal number or one to the base of 60."""

MAX_PROBLEMS = 5
"""That one message tells; a file may have one a line."""

MAX_TEXT = 4096
"""Characters of a text in a config; Linux has no longer paths."""

MAX_SHOWN = 200
"""Characters of a wrong key or text in a message."""

WANTED = {
    "tuple_type": "must be a list",
    "model_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "string_type": "must be a text; put it in quotes",
}
"""Pydantic's type of a problem -> what to say in its place."""

ONE_OF = {"int_": "int", "float_": "float", "literal_": "literal['auto']"}
"""Of a value that may be of several types pydantic has a problem with each: how its type begins -> the last part of its `loc`.
A key that the user gives may bear such a name too."""

SHORT = Repr()
"""Shows a wrong value, and of a large one the beginning: a few lines of YAML make gigabytes by aliases."""
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = MAX_SHOWN
SHORT.maxlevel = 2


class Section(BaseModel):
    """Keys with their types, defaults and bounds. No text in it may be a secret: a config is copied into the run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    retired: ClassVar[dict[str, str]] = {}
    """Keys that the last version knew, and why they are gone: they are passed over, and this is said."""

    @model_validator(mode="before")
    @classmethod
    def without_retired_keys(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for key in cls.retired.keys() & content.keys():
            print(f"mashup: config key {key!r} is passed over: {cls.retired[key]}", file=sys.stderr)
        return {key: value for key, value in content.items() if key not in cls.retired}

    @field_validator("*")
    @classmethod
    def a_text_is_a_name_and_no_secret(cls, value: Any) -> Any:
        for text in (part for part in _parts(value) if isinstance(part, str)):
            if not (text.strip() and text.isprintable() and len(text) <= MAX_TEXT):
                raise ValueError(f"must be a text of 1 to {MAX_TEXT} characters that can be printed")
            if has_secret(text):
                raise ValueError(NO_SECRET)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def reject_bool(cls, value: Any, info: ValidationInfo) -> Any:
        if (
            any(isinstance(part, bool) for part in _parts(value))
            and cls.model_fields[str(info.field_name)].annotation is not bool
        ):
            raise ValueError("must not be true or false")
        return value


def _parts(value: Any) -> Sequence[Any]:
    """The values of a list, or the one value."""
    return value if isinstance(value, list | tuple) else [value]


Asked = TypeVar("Asked", bound=Section)


def read_yaml(path: str, keys: str) -> dict[str, Any]:
    """The content of a config file; `keys` names some that it should have, for the message.

    Raises:
        InputError: no such file, not YAML, or no keys in it.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the config file ({getattr(error, 'strerror', error)})") from error
    if len(text) > MAX_BYTES:
        raise InputError(f"{path}: a config file has {MAX_BYTES} bytes at most; this is another file")
    content = _loaded(text, path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys such as {keys}, got {type(content).__name__}")
    return content


def with_settings(content: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A config's content with other values for some keys, each given as in train.steps=50, the value in YAML.

    Raises:
        InputError: one has no = in it, or no value that is YAML.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key.strip() and equals):
            raise InputError(f"--set {for_display(setting, MAX_SHOWN)}: must be KEY=VALUE, such as train.steps=50")
        value = _loaded(text.encode(errors="surrogateescape"), f"--set {for_display(setting, MAX_SHOWN)}")
        content = _with(content, key.strip().split("."), value)
    return content


def _loaded(text: bytes, source: str) -> Any:
    """What YAML says; `source` names it in the message.

    Raises:
        InputError: it is not valid.
    """
    try:
        return yaml.load(text.decode(), Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # of odd !!tags, too
        raise InputError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from error


def _with(content: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy with one value changed, deep in it; what stands in the way of its section is replaced."""
    content = content if isinstance(content, dict) else {}
    return {**content, keys[0]: _with(content.get(keys[0]), keys[1:], value) if keys[1:] else value}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice, whose first value would be ignored; mappings that grow by merging others
    beyond any honest one; and numbers of YAML 1.1 that are not what they look like, as 0100 is 64 and 1:30 is 90."""

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_KEYS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_KEYS} keys by merges", node.start_mark)

    def construct_yaml_int(self, node: Any) -> int:
        if ODD_NUMBER.match(text := str(self.construct_scalar(node))):
            raise yaml.constructor.ConstructorError(
                None, None, f"{text} is another number in YAML; write it without a leading 0 or a colon", node.start_mark
            )
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def checked(kind: type[Asked], content: dict[str, Any], source: str) -> Asked:
    """`content` as a section of this kind; `source` names it in messages.

    Raises:
        InputError: a key or value that is not right, named with where it stands.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = list(dict.fromkeys(_describe(problem, kind) for problem in error.errors()))
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise InputError(f"{source}: " + "; ".join(problems[:MAX_PROBLEMS] + more)) from error


def _describe(problem: Any, kind: type[Section]) -> str:
    of_several = problem["type"].startswith(tuple(ONE_OF)) and str(problem["loc"][-1]) in ONE_OF.values()
    key = ".".join(for_display(str(part), MAX_SHOWN) for part in problem["loc"][: -1 if of_several else None])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r} (known there: {', '.join(_known_keys(problem['loc'], kind))})"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    message = (
        "must be a number or auto" if of_several else WANTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    )
    return without_secret(f"{key}: {message}, got {SHORT.repr(problem['input'])}") if key else message


def _known_keys(loc: tuple[str | int, ...], kind: type[Section]) -> list[str]:
    section: Any = kind
    for part in loc[:-1]:
        named = get_origin(section) is dict  # of sections, under names that the user gives
        section = get_args(section)[-1] if named else section.model_fields[str(part)].annotation
    return list(section.model_fields)
