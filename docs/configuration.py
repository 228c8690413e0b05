"""Writes docs/configuration.md from the config's own schema: `python docs/configuration.py`."""

import json
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Config
from pipeline.core.settings import Section
from pipeline.refresh.refresh import RefreshConfig

PAGE = Path(__file__).with_suffix(".md")

HEAD = """# Configuration

Made from the schema by `python docs/configuration.py`. A key that is not known is an error. `auto`
leaves the choice to the command.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD, "## `mashup run CONFIG.yaml`", _table(Config)]
    for name, field in Config.model_fields.items():
        if section := _section(field):
            parts += [f"### `{name}`", section.__doc__ or "", _table(section)]
            parts += [text for key, inner in section.model_fields.items() if (text := _inner(f"{name}.{key}", inner))]
    parts += [
        "## `mashup refresh REFRESH.yaml`",
        "`search`, `merge`, `train`, `track` and each of the `targets` are as above.",
        _table(RefreshConfig),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _inner(name: str, field: FieldInfo) -> str:
    section = _section(field)
    return f"`{name}`: {section.__doc__}\n\n{_table(section)}" if section else ""


def _table(section: type[Section]) -> str:
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {_about(field)} |" for name, field in section.model_fields.items()
    ]
    return "\n".join(["| key | value | default | what it is |", "| --- | --- | --- | --- |", *rows])


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _type(field: FieldInfo) -> str:
    if _section(field):
        return "section"
    return _words(field.annotation)


def _words(kind: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): ""}
    if kind in names:
        return names[kind]
    if get_origin(kind) is tuple:
        return f"list of {_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "texts by name" if get_args(kind)[-1] is str else "sections by name"
    parts = [f"`{part}`" if isinstance(part, str) else _words(part) for part in get_args(kind)]
    return ", ".join(part for part in parts if part)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, Section):
        value = {key: given for key, given in value.model_dump(exclude_defaults=True).items() if given is not None}
    if value is None or value == {}:
        return ""
    return f"`{json.dumps(value)}`".replace('"', "")


def _about(field: FieldInfo) -> str:
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [
        f"{word} {getattr(bound, name):,}"
        for bound in field.metadata
        for name, word in bounds.items()
        if getattr(bound, name, None) is not None and getattr(bound, name) < 1 << 31
    ]
    return "; ".join(filter(None, [field.description or "", ", ".join(limits)]))


if __name__ == "__main__":
    PAGE.write_text(page())
