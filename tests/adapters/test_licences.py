"""Licences: what strangers' model cards declare, and what is said of a merge."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.adapters.card import MAX_BYTES, read_card
from pipeline.adapters.licences import conflicts, declared_licence, front_matter


def declared(folder: Path, card: str | bytes) -> str | None:
    (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    return declared_licence(read_card(folder))


@pytest.mark.parametrize(
    ("lines", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("base_model: a/b\ntags:\n- lora\nlicense:   MIT  # as the base", "mit"),
        ("license: 'CC BY-NC\n  4.0'", "cc by-nc 4.0"),
        ("license: [mit, apache-2.0]", "apache-2.0, mit"),
        ("license:\n- cc-by-4.0", "cc-by-4.0"),
        ("license: other\nlicense_name: My-1.0\nlicense_link: https://example.org/my", "other: My-1.0 (https://example.org/my)"),
        ("license: other\nlicense_link: LICENSE", "other (LICENSE)"),
        ("license: other", "other"),
        ("mine: &own mit\nlicense: *own", "mit"),
    ],
)
def test_a_card_declares_its_licence_in_the_front_matter(lines: str, licence: str, tmp_path: Path) -> None:
    assert declared(tmp_path, f"---\n{lines}\n---\n# An adapter\n") == licence
    assert declared(tmp_path, f"\ufeff\r\n---\r\n{lines}\r\n--- \r\n".replace("\n  ", "\r\n  ")) == licence


@pytest.mark.parametrize("licence", ["mit (non-commercial only)", "other: mit (non-commercial use only)"])
def test_what_stands_in_brackets_is_a_part_of_a_licence(licence: str) -> None:
    assert "is for non-commercial use alone" in (conflicts({"a": licence, "b": "apache-2.0"}) or "")


@pytest.mark.parametrize(
    "lines",
    [
        *(
            "",
            "license:",
            "license: null",
            "license: unknown",
            "license: no",
            "license: 2",
            "license: [[mit]]",
            "license: {a: mit}",
        ),
        *("a: b", "- license", "license", "license: [mit", "license: mit\n\tbad: tab", "license: mit\n  a: b", "%YAML 9\n"),
        *("license: *nothing", "license: !!python/object/apply:os.getcwd []", "license: !mine mit", "{license: mit", "'"),
        *(r'license: "\x1b[31mmit"', r'license: "\ud800"', r'license: "\U7fffffff"', r'license: "\Uffffffff"', "license: \x00"),
        "license: " + "m" * 201,
        "%YAML 1." + "1" * 5000 + "\n--- license: mit",
    ],
)
def test_what_is_malformed_or_no_name_declares_nothing(lines: str, tmp_path: Path) -> None:
    assert declared(tmp_path, f"---\n{lines}\n---\n") is None


@pytest.mark.parametrize(
    "card",
    [
        "",
        "license: mit",
        "# Title\n---\nlicense: mit\n---\n",
        "---\nlicense: mit\n",
        "---\nlicense: mit\n----\n",
        b"\xff\xfe---\nlicense",
    ],
)
def test_a_card_without_front_matter_declares_nothing(card: str | bytes, tmp_path: Path) -> None:
    assert declared(tmp_path, card) is None


def test_a_folder_without_a_readable_card_declares_nothing(tmp_path: Path) -> None:
    assert declared_licence(read_card(tmp_path / "gone")) is None
    os.mkfifo(tmp_path / "README.md")  # opening it would wait for ever
    assert declared_licence(read_card(tmp_path)) is None
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    assert declared_licence(read_card(tmp_path / "folder")) is None


def merge_keys(depth: int) -> str:
    """A mapping that is nine times as large with each line where merge keys are carried out."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, depth)]
    return "\n".join(lines)


def test_bombs_take_no_time_and_no_memory(tmp_path: Path) -> None:
    aliases = "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))])
    for bomb in (merge_keys(40), aliases):
        assert declared(tmp_path, f"---\n{bomb}\nlicense: mit\n---\n") == "mit"
        assert declared(tmp_path, f"---\n{bomb}\nlicense: *a39\n---\n") is None
    for deep in ("[" * MAX_BYTES, "- " * MAX_BYTES, "? " * MAX_BYTES, "{a: " * MAX_BYTES):
        assert declared(tmp_path, f"---\nlicense: mit\nx: {deep[: MAX_BYTES // 2]}\n---\n") is None


def test_a_long_card_is_read_in_part(tmp_path: Path) -> None:
    front = "---\nlicense: mit\n---\n"
    assert declared(tmp_path, front + "é" * MAX_BYTES) == "mit"
    assert declared(tmp_path, f"---\n#{'x' * MAX_BYTES}\nlicense: mit\n---\n") is None


@given(st.text(alphabet=list("license: mit-[]{}&*!%?|>'\"\\\n\tux0Ff#<,~")) | st.text())
def test_no_card_stops_anything(tmp_path_factory: pytest.TempPathFactory, lines: str) -> None:
    found = declared(tmp_path_factory.mktemp("card"), f"---\n{lines}\n---\n".encode(errors="replace"))
    assert found is None or found.isprintable()


@pytest.mark.parametrize(
    ("licences", "front"),
    [
        (["mit", "mit"], {"license": "mit"}),
        (["cc-by-nc-4.0"], {"license": "cc-by-nc-4.0"}),
        ([None, None], {"license": "unknown"}),
        (["mit", "apache-2.0", "mit"], {"license": "other", "license_name": "apache-2.0-and-mit"}),
        (["mit", None], {"license": "other", "license_name": "mit-and-unknown"}),
        (["other: My Own, 1.0 (https://example.org)"], {"license": "other", "license_name": "my-own-1.0"}),
        (["other"], {"license": "other", "license_name": "other"}),
        (["apache-2.0, mit"], {"license": "other", "license_name": "apache-2.0-mit"}),
        (["---\nmit"], {"license": "other", "license_name": "mit"}),
        (["许可"], {"license": "other", "license_name": "other"}),
    ],
)
def test_the_merge_has_the_licence_of_all_donors_or_a_list(licences: list[str | None], front: dict[str, str]) -> None:
    assert front_matter(licences) == front
    assert yaml.safe_load(yaml.safe_dump(front)) == front


@pytest.mark.parametrize(
    "licences",
    [
        *([one] for one in ("mit", "gpl-3.0", "cc-by-nc-4.0", "gemma")),
        ["gpl-3.0", "gpl-3.0"],
        ["cc-by-nc-4.0", "cc-by-nc-3.0"],
        ["mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "afl-3.0", "cdla-permissive-2.0"],
    ],
)
def test_of_licences_that_go_together_nothing_is_said(licences: list[str]) -> None:
    assert conflicts({f"donor-{number}": licence for number, licence in enumerate(licences)}) is None


@pytest.mark.parametrize(
    ("donors", "said"),
    [
        ({"a": "cc-by-nd-4.0"}, "cc-by-nd-4.0 of a allows no derivatives, and a merge is one"),
        (
            {"a": "cc-by-nc-nd-4.0", "b": "mit"},
            "cc-by-nc-nd-4.0 of a allows no derivatives, and a merge is one; "
            "cc-by-nc-nd-4.0 of a is for non-commercial use alone, which then holds for the merge",
        ),
        (
            {"a": "mit", "b": "cc by-nc 4.0", "c": "cc by-nc 4.0"},
            "cc by-nc 4.0 of b, c is for non-commercial use alone, which then holds for the merge",
        ),
        ({"a": "mit", "b": "agpl-3.0"}, "agpl-3.0 of b asks for the same licence on what is made from it"),
        (
            {"a": "cc-by-nc-sa-4.0", "b": "cc-by-nc-4.0"},
            "cc-by-nc-sa-4.0 of a asks for the same licence on what is made from it",
        ),
        (
            {"a": "gpl-3.0", "b": "cc-by-sa-4.0"},
            "cc-by-sa-4.0 of b asks for the same licence on what is made from it; "
            "gpl-3.0 of a asks for the same licence on what is made from it",
        ),
        ({"a": "llama3.1", "b": "mit"}, "the terms of llama3.1 of a are not known here"),
        ({"a": "mit-but-mine", "b": "apache-2.0, mit"}, "the terms of mit-but-mine of a are not known here"),
        ({"a": "mit", "b": None, "c": None}, "no licence is declared by b, c"),
        ({"a": None}, "no licence is declared by a"),
        (
            {"a": "cc-by-nc-4.0", "b": None},
            "cc-by-nc-4.0 of a is for non-commercial use alone, which then holds for the merge; no licence is declared by b",
        ),
        (
            {"a": "other: Lab Research 1.0 (LICENSE)", "b": "other: Lab (https://example.org/research)"},
            "the terms of other: Lab (https://example.org/research) of b are not known here; "
            "other: Lab Research 1.0 (LICENSE) of a is for non-commercial use alone, which then holds for the merge",
        ),
    ],
)
def test_conflicts_are_named_in_a_sentence(donors: dict[str, str | None], said: str) -> None:
    assert conflicts(donors) == f"To be settled before the mashup is passed on: {said}."
