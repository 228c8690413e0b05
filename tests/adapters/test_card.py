"""Strangers' model cards: which texts are taken from a field. Hostile YAML is in test_licences.py."""

from pathlib import Path

import pytest

from pipeline.adapters.card import MAX_TEXTS, read_card, text, texts
from pipeline.core.file_names import CARD_FILE


@pytest.mark.parametrize(
    ("field", "found", "whole"),
    [
        ("a/b", ["a/b"], "a/b"),
        ("[c/d, 'a \n b']", ["a b", "c/d"], "a b, c/d"),
        ("[a/b, null, 2024, {name: x}, '', c/d]", ["a/b", "c/d"], None),
        (f"[a/b, {'x' * 201}, {'y' * 200}]", ["a/b", "y" * 200], None),
        (str([f"organisation-{n}/a-data-set" for n in range(9)]), [f"organisation-{n}/a-data-set" for n in range(9)], None),
        (r'[a/b, "\x1b[31m"]', ["a/b"], None),
        *((field, [], None) for field in ("", "null", "5", "{a: b}", "[[a]]", "[]", "x" * 201)),
    ],
)
def test_of_a_list_the_texts_are_taken_and_as_one_text_it_is_whole_or_none(
    field: str, found: list[str], whole: str | None, tmp_path: Path
) -> None:
    (tmp_path / CARD_FILE).write_text(f"---\ndatasets: {field}\n---\n")
    node = read_card(tmp_path)["datasets"]
    assert texts(node) == found
    assert text(node) == whole


def test_of_a_field_that_is_not_there_and_of_an_endless_one(tmp_path: Path) -> None:
    assert texts(None) == []
    assert text(None) is None
    (tmp_path / CARD_FILE).write_text(f"---\ndatasets: {['a'] * 999}\n---\n")
    assert texts(read_card(tmp_path)["datasets"]) == ["a"] * MAX_TEXTS
