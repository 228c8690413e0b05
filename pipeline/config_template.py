"""A config file for a task, with every key that may be left out as a comment: `mashup init`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from pipeline.config import Config
from pipeline.core.settings import Section

HEAD = """# A run of `mashup run`. Keys behind a # have their defaults; docs/configuration.md tells more of each.
"""


def template(given: Mapping[str, Any]) -> str:
    """The text of a config file.

    Args:
        given: values of keys, with sections as mappings; those that are required must be among them.
    """
    return HEAD + "\n".join(_lines(Config, given, "")) + "\n"


def _lines(section: type[Section], given: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and not indent:
            yield f"\n{name}:" if name in given else f"\n# {name}:"
            yield from _lines(kind, given.get(name, {}), "  ")
        elif name in given:
            yield f"{indent}{name}: {json.dumps(given[name], ensure_ascii=False)}{_about(field)}"
        else:
            yield f"{indent}# {name}: {_default(field)}{_about(field)}"


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, Section):
        value = value.model_dump(exclude_none=True)
    return "null" if value is None else json.dumps(value)


def _about(field: FieldInfo) -> str:
    return f"  # {field.description}" if field.description else ""
