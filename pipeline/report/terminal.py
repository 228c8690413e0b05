"""What the command line prints: the leaderboard after a search; after a run the verdict in plain words, and base against
mashup in a small table. Strings from adapters are printed as they are, never read as Rich's markup.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.core.storage import Folder
from pipeline.core.tables import BASE_ID
from pipeline.report import words
from pipeline.report.words import Json

TOP = 25
"""Places of the leaderboard that are printed; the base's is always among them."""

WIDEST = 10_000
"""Characters of a line, to see how wide a table would be without wrapping."""


def leaderboard_table(leaderboard: pa.Table) -> RenderableType:
    """The first places of a leaderboard, and the base's."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Place", justify="right")
    table.add_column("Adapter", overflow="fold")
    for name in ("samples", "NLL", "minus base", "hold-out"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = leaderboard.to_pylist()
    shown = [row for row in rows if row["place"] <= TOP or row["adapter_id"] == BASE_ID]
    for row in shown:
        table.add_row(*map(Text, _cells(row)), style="bold" if row["adapter_id"] == BASE_ID else None)
    left = len(rows) - len(shown)
    return Group(table, Text(f"{words.count(left, 'more place')} in leaderboard.parquet")) if left else table


def summary_table(summary: Json, selection: Json | None) -> RenderableType:
    """The end of a run for a terminal."""
    lines = [
        _parity_line(summary),
        words.hedge_cost(summary),
        words.foretold(summary, selection),
        words.pays(words.parity_of(summary)),
        _donor_line(selection),
        _adapter_line(summary),
        words.passes(summary),
        summary.get("note"),
    ]
    return Group(
        Text(words.single_line(words.verdict(summary, selection)), style="bold"),
        _Arms(summary["inits"], words.measures(summary)),
        *(Text(line) for line in lines if line),
    )


def start_table(selection: Json, folder: Folder) -> RenderableType:
    """The end of a run that trains nothing: the adapter to start from, and how to go on."""
    verdict = Text(words.single_line(words.verdict(None, selection)), style="bold")
    if selection["verdict"] == "base":
        return Group(verdict, Text("There is no adapter to start from: finetune the base as you would have done."))
    adapter = folder.sub("mashup").uri
    past = words.foretold(None, selection)
    return Group(
        verdict,
        *([Text(past)] if past else []),
        Text(f"Start from {adapter}"),
        Text(f'  TRL, PEFT:      PeftModel.from_pretrained(model, "{adapter}", is_trainable=True)'),
        Text(f"  axolotl:        lora_model_dir: {adapter}"),
        Text(f"  LLaMA-Factory:  adapter_name_or_path: {adapter}"),
        Text("More: docs/hand-off.md"),
    )


def found_so_far(folder: Folder) -> Json:
    """What a run has, for `mashup show`: its stages, and the documents that are there."""
    names = {"stages": "stages.json", "selection": "selection.json", "summary": "summary.json"}
    return {name: folder.read_json(file) for name, file in names.items() if folder.exists(file)}


def run_table(folder: Folder, found: Json) -> RenderableType:
    """What a run has found so far, and how far it is."""
    stages = Table(box=box.SIMPLE_HEAD)
    for name in ("Stage", "state", "seconds"):
        stages.add_column(name, justify="right" if name == "seconds" else "left", no_wrap=True)
    for name, record in found.get("stages", {}).items():
        if "done" in record:
            stages.add_row(name, "done" if record["done"] else "not done", f"{record['seconds']:.0f}")
    if "summary" in found:
        return Group(stages, summary_table(found["summary"], found.get("selection")))
    if "selection" in found:
        return Group(stages, start_table(found["selection"], folder))
    if folder.exists("leaderboard.parquet"):
        return Group(stages, leaderboard_table(folder.read_table("leaderboard.parquet")))
    return stages


def plan_table(plan: Json) -> RenderableType:
    """What a run will do and cost."""
    counts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    counts.add_column(style="dim", no_wrap=True)
    for name, text in _counts(plan):
        counts.add_row(name, Text(text))
    pays = words.pays_by_past_runs(plan.get("pays"))
    lines = [*([pays] if pays else []), *(f"Note: {note}." for note in plan["notes"])]
    return Group(counts, _costs(plan), *map(Text, lines))


def _counts(plan: Json) -> list[tuple[str, str]]:
    candidates, samples, fetch, tokens = (plan[name] for name in ("candidates", "adapter_samples", "fetch", "tokens"))
    memory, arms = plan["engines"]["memory_bytes"], plan["arms"]
    left = "none is left to score" if not samples["at_most"] else f"at most {samples['at_most']:,} are left to score"
    return [
        ("Candidates", f"{candidates['valid']:,} valid of {candidates['found']:,}; {candidates['in_the_race']:,} in the race"),
        ("Adapter-samples", f"{samples['all']:,}, of which {samples['in_store']:,} are in the store; {left}"),
        ("Tokens", ", ".join(f"{name} {count:,}" for name, count in tokens.items())),
        ("To fetch", _to_fetch(fetch)),
        ("Engines", f"{plan['engines']['count']}, each with at least {words.size(memory['total'])} of memory: {_parts(memory)}"),
        ("Training", f"{words.count(arms['count'], 'arm')}, {arms['at_once']} at once"),
    ]


def _to_fetch(fetch: Json) -> str:
    if not fetch["adapters"]:
        return "nothing"
    over_all = f"{words.size(fetch['bytes'])} to a node, {words.size(fetch['bytes_at_most'])} to all"
    return f"at most {words.count(fetch['adapters'], 'adapter')}, {over_all}; less what the index left in their caches"


def _parts(memory: Json) -> str:
    return ", ".join(f"{name} {words.size(memory[name])}" for name in ("weights", "adapters", "cache") if memory[name])


def _costs(plan: Json) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Stage")
    for name in ("time", "GPU-hours", "CPU thread-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, cost in {**plan["stages"], "total": plan["total"]}.items():
        hours = (words.DASH if cost[unit] is None else f"{cost[unit]:.3g}" for unit in ("gpu_hours", "thread_hours"))
        table.add_row(name, words.duration(cost["seconds"]), *hours, style="bold" if name == "total" else None)
    return table


def _cells(row: Json) -> list[str]:
    difference = f"{words.signed(row['nll_minus_base'])} ± {words.nll(row['nll_minus_base_stderr'])}"
    return [
        str(row["place"]),
        words.single_line(row["adapter_id"]),
        str(row["n_samples"]),
        words.nll(row["nll"]),
        difference,
        words.signed(row["holdout_nll_minus_base"]),
    ]


@dataclass(frozen=True)
class _Arms:
    """The starts side by side; those that the terminal has no room for stand below, in a table of their own."""

    inits: Json
    measures: Sequence[words.Measure]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        left = list(self.inits)
        while left:
            tables = (self._table(left[:count]) for count in range(len(left), 0, -1))
            table = next((one for one in tables if _fits(one, console, options)), self._table(left[:1]))
            yield table
            left = left[len(table.columns) - 1 :]

    def _table(self, names: Sequence[str]) -> Table:
        inits = {name: self.inits[name] for name in names}
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("", style="dim")
        for init in inits:
            table.add_column(Text(init), justify="right")
        for name, cells in _rows(inits, self.measures, words.has_parity(self.inits)):
            table.add_row(name, *(Text(cell) for cell in cells))
        return table


def _fits(table: Table, console: Console, options: ConsoleOptions) -> bool:
    wanted = Measurement.get(console, options.update(max_width=WIDEST), table).maximum
    return wanted <= options.max_width


def _rows(inits: Json, measures: Sequence[words.Measure], has_parity: bool) -> list[tuple[str, list[str]]]:
    arms = list(inits.values())
    made = [words.duration(arm.get("start_seconds")) for arm in arms]
    test = [(one.name, [words.measured(one, arm.get(one.key)) for arm in arms]) for one in measures]
    return [
        *test,
        ("Validation NLL at the start", [words.nll(arm["validation_nll_start"]) for arm in arms]),
        ("Validation NLL, best", [f"{words.nll(arm['validation_nll_best'])} (step {arm['best_step']})" for arm in arms]),
        ("Validation NLL at the end", [words.final_nll(arm) for arm in arms]),
        *([("Steps to the base's end", [words.parity_step(arm) for arm in arms])] if has_parity else []),
        ("Learning rate", [words.rate(arm["lr"]) for arm in arms]),
        ("Training time", [words.duration(arm["train_seconds"]) for arm in arms]),
        *([("Time to make the start", made)] if any(one != words.DASH for one in made) else []),
    ]


def _parity_line(summary: Json) -> str | None:
    parity = words.parity_of(summary)
    if not parity:
        return None
    overhead = words.duration(summary["overhead_seconds"]["total"])
    if not parity["reached"]:
        return f"Parity not reached in {words.steps(parity['base_steps'])}; {overhead} went into finding and merging donors."
    steps = f"{words.step(parity['steps'])} of {words.step(parity['base_steps'])}"
    spent = f"{words.duration(parity['seconds'])} with {overhead} of overhead, base {words.duration(parity['base_seconds'])}"
    return f"Parity at step {steps}: {spent} ({words.compared_time(parity['seconds_saved'])})."


def _donor_line(selection: Json | None) -> str | None:
    donors = selection["donors"] if selection else []
    named = ", ".join(f"{words.single_line(donor['adapter_id'])} (weight {donor['weight']:.3g})" for donor in donors)
    return f"Donors: {named}" if named else None


def _adapter_line(summary: Json) -> str | None:
    return f"Best finetuned weights, by validation NLL: {summary['adapter']}" if summary.get("adapter") else None
