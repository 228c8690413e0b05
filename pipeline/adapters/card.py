"""The front matter of strangers' model cards.

A card is a stranger's file. Its YAML is parsed to nodes and no further: nothing is made of them, and what aliases and merge keys
repeat is not multiplied, as it is by parsers that make values. Malformed front matter has no fields.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from pipeline.core.file_names import CARD_FILE

MAX_BYTES = 64 << 10
"""So much of a card is read. Front matter takes some hundred bytes; of the worst, this much takes the parser about a second."""

MAX_CHARACTERS = 200
"""A text that is longer is none."""

MAX_TEXTS = 64
"""Of a list; the first are taken."""

TEXT = "tag:yaml.org,2002:str"

Fields = Mapping[str, yaml.Node]


def read_card(folder: Path) -> Fields:
    """The fields of the card in a folder; none where there is no card."""
    file = folder / CARD_FILE
    if not file.is_file():
        return {}
    try:
        with file.open("rb") as card:
            return _fields(card.read(MAX_BYTES).decode(errors="replace"))
    except (OSError, yaml.YAMLError, RecursionError, ValueError, OverflowError):
        return {}


def texts(node: yaml.Node | None) -> list[str]:
    """A string, or those in a list, in alphabetical order, each on one line; what else is there, or too long, is passed over."""
    return sorted(filter(None, map(_text, _parts(node)[:MAX_TEXTS])))


def text(node: yaml.Node | None) -> str | None:
    """A string, or a list of them, in one line; None: the node is something else, in part or whole, or too long."""
    found = [_text(part) for part in _parts(node)]
    whole = ", ".join(sorted(filter(None, found)))
    return whole if all(found) and 0 < len(whole) <= MAX_CHARACTERS else None


def _parts(node: yaml.Node | None) -> list[yaml.Node | None]:
    return node.value if isinstance(node, yaml.SequenceNode) else [node]


def _text(node: yaml.Node | None) -> str | None:
    """A string on one line, or None: the node is something else, empty, or too long."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != TEXT:
        return None
    found = " ".join(node.value.split())
    return found if found.isprintable() and 0 < len(found) <= MAX_CHARACTERS else None


def _fields(card: str) -> dict[str, yaml.Node]:
    """The front matter of a card, which stands between two lines of three dashes at its beginning."""
    first, *lines = card.removeprefix("\ufeff").lstrip().split("\n")
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if first.rstrip() != "---" or not ends:
        return {}
    root = yaml.compose("\n".join(lines[: ends[0]]), Loader=yaml.SafeLoader)
    pairs: Sequence[tuple[yaml.Node, yaml.Node]] = root.value if isinstance(root, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}
