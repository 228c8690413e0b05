"""A config file and its sections: keys are known, values checked, and messages name the file, the key and its value."""

from collections import Counter
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from pipeline.errors import InputError
from pipeline.storage import NO_SECRET, has_secret, without_secret

MAX_BYTES = 1 << 20
"""Of a config file."""

MAX_TEXT = 4096
"""Characters of a text in a config; Linux has no longer paths."""

MAX_SHOWN = 200
"""Characters of a wrong key or text in a message."""

SHORT = Repr()
"""Shows a wrong value, and of a large one the beginning: a few lines of YAML make gigabytes by aliases."""
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = MAX_SHOWN
SHORT.maxlevel = 2


class Section(BaseModel):
    """Keys with their types, defaults and bounds. No text in it may be a secret: a config is copied into the run folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def a_text_is_a_name_and_no_secret(cls, value: Any) -> Any:
        if isinstance(value, str) and not (value.strip() and value.isprintable() and len(value) <= MAX_TEXT):
            raise ValueError(f"must be a text of 1 to {MAX_TEXT} characters that can be printed")
        if isinstance(value, str) and has_secret(value):
            raise ValueError(NO_SECRET)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(part, bool) for part in parts) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("must not be true or false")
        return value


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
    try:
        content = yaml.load(text.decode(), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys such as {keys}, got {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice: the first value would be ignored."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def checked(kind: type[Asked], content: dict[str, Any], source: str) -> Asked:
    """`content` as a section of this kind; `source` names it in messages.

    Raises:
        InputError: a key or value that is not right, named with its place.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: " + "; ".join(_describe(problem, kind) for problem in error.errors())) from error


def _describe(problem: Any, kind: type[Section]) -> str:
    place = ".".join(str(part)[:MAX_SHOWN] for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {place!r} (known there: {', '.join(_known_keys(problem['loc'], kind))})"
    if problem["type"] == "missing":
        return f"key {place!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return without_secret(f"{place}: {message}, got {SHORT.repr(problem['input'])}") if place else message


def _known_keys(place: tuple[str | int, ...], kind: type[Section]) -> list[str]:
    section: Any = kind
    for part in place[:-1]:
        named = get_origin(section) is dict  # of sections, under names that the user gives
        section = get_args(section)[-1] if named else section.model_fields[str(part)].annotation
    return list(section.model_fields)
