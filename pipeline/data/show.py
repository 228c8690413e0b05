"""The first rows of a target as they are understood, for a person: `mashup samples CONFIG.yaml --show 3`.

No Ray is needed; only so much of the first file is read as the rows take.
"""

from collections.abc import Iterator
from itertools import islice

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pipeline.config import Config
from pipeline.data.forms import RowError, conversation
from pipeline.data.readers import first_rows
from pipeline.data.render import render
from pipeline.data.splits import reading_of, target_paths
from pipeline.data.tokenise import Reading, parse, tokenise
from pipeline.model.base_model import load_tokenizer

LEARNED, CONTEXT = "bold green", "dim"
MARKS = "[[", "]]"
"""Around what is learned, where there are no colours."""

UNSEEN = str.maketrans({chr(code): "\N{REPLACEMENT CHARACTER}" for code in range(32) if chr(code) not in "\n\t"})
"""Signs that would steer the terminal."""


def show_rows(config: Config, count: int, marks: tuple[str, str] = ("", "")) -> Iterator[Text]:
    """So many rows of target.train; what is learned of them is in colour, and between `marks`.

    Raises:
        InputError: as for `splits.draw_samples`.
    """
    tokenizer, reading = load_tokenizer(config.base), reading_of(config)
    path = target_paths(config)["train"]
    for number, row in enumerate(islice(first_rows(path, "train", list(reading.columns.values())), count), start=1):
        yield _shown(number, row, tokenizer, reading, marks)


def _shown(number: int, row: bytes, tokenizer: PreTrainedTokenizerBase, reading: Reading, marks: tuple[str, str]) -> Text:
    shown = Text(f"row {number}: ")
    try:
        said = parse(row)
        tokens = tokenise(said, tokenizer, reading)
        text, answers, _ = render(conversation(said, reading.columns), tokenizer, reading.turns)
    except RowError as error:
        return shown.append(f"passed over: {error}\n")
    note = f"; {tokens['note']}" if "note" in tokens else ""
    choices = f"; {len(tokens['choices'])} choices" if "choices" in tokens else ""
    shown.append(
        f"{len(tokens['input_ids'])} tokens, {sum(tokens['learn_mask'])} of them learned, ends of turns included{choices}{note}\n"
    )
    at = 0
    for start, end in answers:
        learned = text[start:end].translate(UNSEEN).join(marks)
        shown.append(text[at:start].translate(UNSEEN), CONTEXT).append(learned, LEARNED)
        at = end
    return shown.append(text[at:].translate(UNSEEN), CONTEXT).append("\n")
