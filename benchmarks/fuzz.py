"""Do bad files ever do more than be refused? A coverage-guided fuzzer on the readers of what strangers write.

    python -m benchmarks.fuzz [--inputs 100000]                  # needs atheris: pip install '.[fuzz]'

Readers: an adapter's config and weights, up to its spectrum (`adapter`); a row of a data set, up to its tokens (`row`); a config
file and a list of adapters (`config`). libFuzzer mutates valid files and keeps what reaches new code. Each reader may give a
result or its own error with a reason; any other exception, an input that takes more than SECONDS of CPU time, or one that needs
more than MEGABYTES beyond the start is a crash, and the input is kept. The last line is a JSON object:
    inputs, refused, crashes         over all readers
    slowest_seconds, megabytes       the worst input's CPU time, and the growth of the process that grew most
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

SECONDS, MEGABYTES = 1.0, 500
EVERY = 250
"""Inputs after which a child says how far it is."""

Reader = Callable[[bytes], None]
"""Reads one input, or raises an error that is meant."""


def main(
    inputs: Annotated[int, typer.Option(help="Over all readers.")] = 100_000,
    child: Annotated[str, typer.Option(hidden=True)] = "",
    work: Annotated[Path, typer.Option(help="Folder of the inputs that were worth keeping.")] = Path(".cache/fuzz"),
) -> None:
    """Fuzz the readers, one process each; the last line is a JSON object."""
    if child:
        _fuzz(child, inputs, work)
    shares = {"adapter": 0.7, "row": 0.15, "config": 0.15}
    found = {reader: _run(reader, round(share * inputs), work.resolve() / reader) for reader, share in shares.items()}
    for reader, outcome in found.items():
        print(f"{reader}: {json.dumps(outcome)}")
    total = {name: sum(outcome[name] for outcome in found.values()) for name in ("inputs", "refused", "crashes")}
    worst = {name: max(outcome[name] for outcome in found.values()) for name in ("slowest_seconds", "megabytes")}
    print(json.dumps(total | worst))
    if total["crashes"]:
        raise typer.Exit(1)


def _run(reader: str, inputs: int, work: Path) -> dict[str, Any]:
    """Fuzz one reader in a process of its own, as libFuzzer ends its process."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.fuzz", "--child", reader, "--inputs", str(inputs), "--work", str(work)]
    ended = subprocess.run(command, stderr=(work / "log").open("w"), check=False)
    outcome: dict[str, Any] = json.loads((work / "outcome.json").read_text())
    return outcome | {"crashes": int(ended.returncode != 0)}


def _fuzz(reader: str, inputs: int, work: Path) -> None:
    """Never returns."""
    import atheris

    with atheris.instrument_imports(include=["pipeline", "peft.tuners.lora.config", "peft.config", "json"]):
        read, seeds, meant = READERS[reader](work)
    corpus = work / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    tell = _Count(work / "outcome.json", inputs)

    def one(content: bytes) -> None:
        started = time.thread_time()
        try:
            read(content)
            reason = ""
        except meant as error:
            reason = str(error)
            if not reason.strip():
                raise AssertionError("refused without a reason") from error
        tell(reason, time.thread_time() - started)

    atheris.Setup([sys.argv[0], f"-runs={inputs}", f"-artifact_prefix={work}/", "-max_len=8192", str(corpus)], one)
    atheris.Fuzz()


class _Count:
    """What became of the inputs, written down every now and then."""

    def __init__(self, file: Path, inputs: int):
        self._file, self._most = file, inputs
        self._n, self._slowest, self._start = 0, 0.0, _megabytes()
        self._reasons: Counter[str] = Counter()

    def __call__(self, reason: str, seconds: float) -> None:
        self._n += 1
        self._slowest = max(self._slowest, seconds)
        self._reasons[reason.partition(":")[0][:40]] += bool(reason)
        grown = _megabytes() - self._start
        if self._n % EVERY == 0 or self._n >= self._most or seconds > SECONDS or grown > MEGABYTES:
            refused = sum(self._reasons.values())
            common = dict(self._reasons.most_common(12))
            outcome = {
                "inputs": self._n,
                "refused": refused,
                "slowest_seconds": round(self._slowest, 3),
                "megabytes": round(grown),
            }
            self._file.write_text(json.dumps(outcome | {"reasons": common}))
        if seconds > SECONDS:
            raise AssertionError(f"{seconds:.1f} s for one input")
        if grown > MEGABYTES:
            raise AssertionError(f"{grown:.0f} MB more than at the start")


def _megabytes() -> float:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _adapter(work: Path) -> tuple[Reader, list[bytes], type[Exception]]:
    """The first byte says what of a valid adapter the rest replaces: its config, its weights file, or the header of this."""
    from benchmarks.pools import random_adapters, tiny_base
    from pipeline.adapters.adapter import read_adapter
    from pipeline.adapters.spectrum import sketch, spectrum
    from pipeline.core.errors import AdapterError
    from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
    from pipeline.model.base_model import linear_shapes

    shapes, head = linear_shapes(base := tiny_base(work / "base"))
    random_adapters(work / "pool", base, 1, rank=1)
    valid = work / "pool" / "random-00000"
    config, weights = ((valid / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
    length = int.from_bytes(weights[:8], "little")
    header, values = weights[8 : 8 + length], weights[8 + length :]
    folder = work / "input"
    folder.mkdir()

    def read(content: bytes) -> None:
        kind, rest = content[:1], content[1:]
        (folder / CONFIG_FILE).write_bytes(rest if kind == b"c" else config)
        other = len(rest).to_bytes(8, "little") + rest + values
        (folder / WEIGHTS_FILE).write_bytes(rest if kind == b"w" else other if kind == b"h" else weights)
        adapter = read_adapter(folder, shapes, head)
        spectrum(adapter)
        sketch(adapter, 0)

    patterns = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {".*v_proj": 2}, "target_modules": r".*\.(q|v)_proj", "r": 1}
    other = json.dumps(json.loads(config) | patterns).encode()
    small = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"]}).encode()
    return read, [b"c" + config, b"c" + other, b"c" + small, b"w" + weights, b"h" + header], AdapterError


def _row(work: Path) -> tuple[Reader, list[bytes], type[Exception]]:
    from benchmarks.pools import byte_tokenizer
    from pipeline.data.tokenise import Reading, tokenise_text

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"

    def read(content: bytes) -> None:
        if problem := tokenise_text(content, tokenizer, 0, Reading(256)).get("problem"):
            raise ValueError(problem)

    rows = [
        {"prompt": "What is it?", "completion": "a cat"},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
        {"prompt": [{"role": "user", "content": "Hello"}], "completion": [{"role": "assistant", "content": "Hi \u00e9"}]},
    ]
    return read, [json.dumps(row).encode() for row in rows], ValueError


def _config(work: Path) -> tuple[Reader, list[bytes], type[Exception]]:
    """The first byte says what the rest is: a config file, or a list of adapters."""
    from pipeline.adapters.pool import list_entries
    from pipeline.config import load_config
    from pipeline.core.errors import InputError
    from pipeline.core.storage import Folder

    file = work / "file"

    def read(content: bytes) -> None:
        file.write_bytes(content[1:])
        if content[:1] == b"l":
            list_entries(Folder.at(file))
        else:
            load_config(str(file))

    full = "run: r\nbase: b/c\npool: p\ntarget: {train: t.jsonl}\nsearch: {budget: {seconds: 5}}\n"
    return read, [b"c" + full.encode(), b"l" + b"a\n../b # note\norg/name\ns3://bucket/x\n"], InputError


READERS = {"adapter": _adapter, "row": _row, "config": _config}

if __name__ == "__main__":
    typer.run(main)
