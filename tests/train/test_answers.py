"""What weights answer: the likeliest choices and what is written, each against plain transformers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from pipeline.core.storage import Folder
from pipeline.core.tables import ANSWERS, TEST
from pipeline.data.tokenise import Reading, tokenise
from pipeline.model.completion_loss import may_share_batches, score_tokens
from pipeline.train.answers import (
    LEAST_WRITTEN,
    Asked,
    _share_of_choices,
    _stops,
    _written,
    answers_on_test,
    asked,
    choose,
    longest,
    texts_of,
    write,
)
from pipeline.train.arm import Job
from pipeline.train.loop import Finetuning

pytestmark = pytest.mark.timeout(120)

CHOICES = ["fox", "The capital of France is Paris.", "the lazy dog", "42"]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{word} and {word}?", "completion": CHOICES[n % 4], "choices": CHOICES}
    for n, word in enumerate(["fox", "the river near the bank", "12 + 30", "a", "Is this review positive?", "7"])
]


def table(rows: list[dict[str, Any]], base: str) -> pa.Table:
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = [tokenise(row, tokenizer, Reading(choices=True)) for row in rows]
    return pa.Table.from_pylist([{"sample_id": f"s{n}", "split": "test", **one} for n, one in enumerate(found)], schema=TEST)


@pytest.fixture(scope="module")
def model(tiny_base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """Of an answer's tokens given the chat template's prompt, one row at a time and from whole logits; and their number."""
    turn = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([before + said])).logits[0].log_softmax(dim=-1)
    return sum(float(logs[len(before) + n - 1, token]) for n, token in enumerate(said)), len(said)


@pytest.mark.parametrize("metric", ["choices", "choices_per_token"])
def test_the_choice_is_that_of_the_highest_likelihood(
    metric: str, model: Any, tokenizer: Any, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.answers.EVALUATION_TOKENS", 64)  # several batches a row
    found = choose(partial(score_tokens, model), table(ROWS, tiny_base), tokenizer, metric)
    expected = []
    for row in ROWS:
        likely = [log_likelihood(model, tokenizer, row["prompt"], choice) for choice in CHOICES]
        values = [sum_ / count if metric == "choices_per_token" else sum_ for sum_, count in likely]
        expected.append(CHOICES[values.index(max(values))])
    assert found["answer"].to_pylist() == expected
    assert found["score"].to_pylist() == [float(one == row["completion"]) for one, row in zip(expected, ROWS, strict=True)]
    assert found.schema == ANSWERS
    assert found["reference"].to_pylist() == [row["completion"] for row in ROWS]
    assert found["prompt"][0].as_py() == "user\nfox and fox?\nassistant"


def test_the_two_ways_to_choose_differ_here(model: Any, tokenizer: Any, tiny_base: str) -> None:
    """Else the test above tells nothing of the division."""
    rows = table(ROWS, tiny_base)
    by = {metric: choose(partial(score_tokens, model), rows, tokenizer, metric) for metric in ("choices", "choices_per_token")}
    assert by["choices"]["answer"].to_pylist() != by["choices_per_token"]["answer"].to_pylist()


def test_a_batch_has_choices_of_one_row_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that their prompt is computed once."""
    monkeypatch.setattr("pipeline.train.answers.EVALUATION_TOKENS", 30)
    assert _share_of_choices([[9, 10, 11], [5, 5], [40, 2]], 0, 1) == [[2, 1], [0], [3, 4], [5], [6]]
    shares = [_share_of_choices([[9, 10, 11], [5, 5]], rank, 2) for rank in range(2)]
    assert shares == [[[2, 1], [3, 4]], [[0], []]]


def test_workers_choose_together_what_one_chooses(
    model: Any, tokenizer: Any, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More workers than batches: who has none still takes part in each pass."""
    passes: list[int] = []

    def score(batch: Any) -> Any:
        passes[-1] += 1
        return score_tokens(model, batch)

    rows, shares = table(ROWS[:1], tiny_base), list[torch.Tensor]()
    monkeypatch.setattr("pipeline.train.answers.sum_over_workers", lambda mine, workers: shares.append(mine) or mine)
    for rank in range(6):
        passes.append(0)
        choose(score, rows, tokenizer, "choices", rank, 6)
    assert set(passes) == {1}
    choose(score, rows, tokenizer, "choices")
    torch.testing.assert_close(sum(shares[:6]), shares[6])


def test_what_is_written_is_what_generate_writes_row_by_row(
    tokenizer: Any, tiny_base: str, job: Callable[..., Job], data: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training, so that answers end; the base's own wishes for sampling and penalties are not heard."""
    monkeypatch.setattr("pipeline.train.answers.GENERATION_TOKENS", 300)
    finetuning = Finetuning(job(steps=80, evaluations=1), 0, 1, lambda metrics, snapshot: None)
    finetuning.run()
    model = finetuning.trainable.model.get_base_model().eval()
    rows = asked(data.read_table("train.parquet"))
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0)
    found = write(model, rows, tokenizer)
    model.generation_config = GenerationConfig()
    for row, text in zip(rows, found, strict=True):
        ids = torch.tensor([row.prompt])
        plain = model.generate(ids, max_new_tokens=longest(rows), do_sample=False, eos_token_id=2, pad_token_id=0)
        assert text == tokenizer.decode(plain[0, len(row.prompt) :], skip_special_tokens=True).strip()
    assert len({len(row.prompt) for row in rows}) > 1
    right = [text == tokenizer.decode(row.answer) for text, row in zip(found, rows, strict=True)]
    assert any(right)


BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "rwkv": {"attention_hidden_size": 32},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8, "num_local_experts": 2},
    "phi3": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    },
}


@pytest.mark.parametrize("kind", BASES)
def test_a_row_is_answered_alike_whoever_shares_its_batch(kind: str, tokenizer: Any) -> None:
    """Padding before a prompt goes into a state, as RWKV and MiniMax have it; by longrope a longer prompt turns it otherwise."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | heads | BASES[kind])).eval()
    prompts = [torch.randint(10, 300, (length,)).tolist() for length in (60, 9, 20, 9)]
    rows = [Asked(prompt, [70], [4]) for prompt in prompts]
    assert write(model, rows, tokenizer) == [write(model, [row], tokenizer)[0] for row in rows]
    assert may_share_batches(model) == (kind == "llama")


def test_rows_of_other_lengths_beside_it_change_no_answer(model: Any, tokenizer: Any, tiny_base: str) -> None:
    rows = asked(table(ROWS, tiny_base))
    assert len({len(row.prompt) for row in rows}) > 3
    assert write(model, rows, tokenizer) == [write(model, [row], tokenizer)[0] for row in rows]


def test_of_a_conversation_the_last_answer_is_asked(tokenizer: Any, tiny_base: str) -> None:
    turns = [("user", "7 times 6?"), ("assistant", "42"), ("user", "France?"), ("assistant", "It is Paris")]
    row = tokenise({"messages": [{"role": role, "content": text} for role, text in turns]}, tokenizer)
    (found,) = asked(pa.Table.from_pylist([row]))
    assert tokenizer.decode(found.answer) == "It is Paris"
    assert tokenizer.decode(found.prompt).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    assert found.end == [tokenizer.eos_token_id]
    assert texts_of(pa.Table.from_pylist([row]), tokenizer) == (
        ["user\n7 times 6?\nassistant\n42\nuser\nFrance?\nassistant"],
        ["It is Paris"],
    )


def test_an_answer_ends_at_no_token_that_is_within_another(model: Any, tokenizer: Any, tiny_base: str) -> None:
    """Where a template ends turns by a line end, answers of several lines are written to their end."""
    rows = asked(table(ROWS, tiny_base))
    line_end = tokenizer("\n")["input_ids"]
    assert _stops([row._replace(end=line_end) for row in rows], tokenizer) == sorted([*line_end, 2])
    several = rows[0]._replace(answer=[*rows[0].answer, *line_end, *rows[0].answer], end=line_end)
    assert _stops([several], tokenizer) == [2]


def test_an_answer_may_be_twice_as_long_as_the_longest_and_within_the_base(model: Any, tiny_base: str) -> None:
    (row,) = asked(table(ROWS[:1], tiny_base))
    assert longest([row]) == LEAST_WRITTEN
    assert longest([row._replace(answer=[5] * 100)]) == 200
    crowded = (row.prompt * 512)[: model.config.max_position_embeddings - 3]
    assert [len(ids) for ids in _written(model, [crowded], [], 32)] == [3]


def test_a_prompt_that_all_but_fills_the_base_takes_no_room_from_others(model: Any, tokenizer: Any) -> None:
    crowded = Asked([5] * (model.config.max_position_embeddings - 3), [70], [4])
    rows = [Asked([9] * 8, [70], [4]), crowded, Asked([11] * 9, [70], [4])]
    assert write(model, rows, tokenizer) == [write(model, [row], tokenizer)[0] for row in rows]


def test_a_checkpoint_answers_on_the_test_split(tiny_base: str, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "data")
    folder.write_table("test.parquet", table(ROWS, tiny_base))
    adapter = Folder.at(make_adapter(tmp_path / "adapter", tiny_base, std=0.3))
    chosen = answers_on_test(tiny_base, "float32", folder, adapter, "choices")
    written = answers_on_test(tiny_base, "float32", folder, adapter, "exact_match")
    assert chosen["answer"].to_pylist() != written["answer"].to_pylist()
    assert written["score"].null_count == len(ROWS)
    assert written["sample_id"].to_pylist() == [f"s{n}" for n in range(len(ROWS))]
