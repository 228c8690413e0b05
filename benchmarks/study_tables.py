"""The tables and figures of the study, from the results that are kept: nothing is trained or scored.

    python -m benchmarks.study_tables [benchmarks/results/study ...]      # by default every folder there with an arms.csv

Each folder gets tables.md, tables.tex and, for each base, curves-<base>.png; they are made from its arms.csv alone.

Means over tasks, seeds averaged within each; a task where the verdict is to start from the base counts as no difference, one
without parity as nothing saved. In brackets the 95 % bootstrap interval; p is two-sided, by flips of the signs of the tasks'
differences; `detectable` is the difference that so many tasks of this spread show four times in five.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.account import Figures, Task, account
from benchmarks.over_tasks import Means, over_tasks
from benchmarks.study_arms import FILE, StudyArm, read_arms
from pipeline.report.plots import COLOURS, MARKERS, OTHER_COLOUR

RESULTS = Path(__file__).parent / "results"

TASKS, WITHOUT_KIN = 12, 4
"""That a study should have, of them so many without a related donor in the pool."""


@dataclass(frozen=True)
class Table:
    """Cells as plain text, the first column left."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        cells = [self.heads, ["---"] * len(self.heads), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in cells), ""])

    def latex(self) -> str:
        lines = [" & ".join(map(_tex, row)) + r" \\" for row in (self.heads, *self.rows)]
        return "\n".join(
            [
                f"% {self.title}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.heads) - 1)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )


def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of results; by default all there are.")] = None,
) -> None:
    """Write the tables and figures of each folder."""
    for folder in folders or sorted(file.parent for file in RESULTS.glob(f"*/{FILE}")):
        print(write_tables(folder))


def write_tables(folder: Path) -> str:
    """The tables of one folder, which are also written into it, with the figures. Gives the Markdown.

    Raises:
        ValueError: its table lacks a column, or it has no arm.
    """
    arms, notes = current(read_arms(folder / FILE))
    if not arms:
        raise ValueError(f"{folder / FILE}: no arm is in it")
    tables, tasks = [], tasks_of(arms)
    bases = list(dict.fromkeys(task.base for task in tasks))
    for base in bases:
        ours = [task for task in tasks if task.base == base]
        tables += tables_of(base, ours)
        notes += notes_of(base, ours, arms)
        draw_curves([arm for arm in arms if arm.base == base]).savefig(folder / f"curves-{_file_name(base)}.png", dpi=110)
    if len(bases) > 1:
        tables.append(means_table(f"All {len(bases)} bases, a task's difference averaged over them", tasks))
    text = "\n".join([*(table.markdown() for table in tables), *(f"- {note}" for note in notes)]) + "\n"
    (folder / "tables.md").write_text(text)
    (folder / "tables.tex").write_text("\n".join(table.latex() for table in tables))
    return text


def current(arms: Sequence[StudyArm]) -> tuple[list[StudyArm], list[str]]:
    """The arms of the settings that were written last, and what is to be said of the others."""
    last = arms[-1].settings if arms else ""
    kept = [arm for arm in arms if arm.settings == last]
    left = len(arms) - len(kept)
    return kept, [f"{left} arms of other settings are left out."] if left else []


def tasks_of(arms: Sequence[StudyArm]) -> list[Task]:
    """The tasks of each base that have an arm from the base."""
    names = dict.fromkeys((arm.base, arm.task) for arm in arms)
    found = (account([arm for arm in arms if (arm.base, arm.task) == name]) for name in names)
    return [task for task in found if task]


def tables_of(base: str, tasks: Sequence[Task]) -> list[Table]:
    found = [task_table(base, tasks), means_table(f"{base}: means over {len(tasks)} tasks", tasks)]
    return [*found, paper_table(base, tasks)]


def task_table(base: str, tasks: Sequence[Task]) -> Table:
    """Each task by our accounting."""
    inits = list(dict.fromkeys(init for task in tasks for init in task.starts))
    heads = [
        "task",
        "kin",
        "recipe",
        "parity, share of steps",
        "overhead / base's training",
        *(f"{init}: NLL, match" for init in inits),
    ]
    rows = [
        [
            task.name,
            "yes" if task.kin else "no",
            task.recipe or "base",
            _parity(task),
            f"{task.overhead_seconds:.0f} s / {task.base_seconds:.0f} s",
            *(_cell(task.starts.get(init)) for init in inits),
        ]
        for task in tasks
    ]
    return Table(f"{base}: tasks", heads, rows)


def means_table(title: str, tasks: Sequence[Task]) -> Table:
    """Means over tasks with interval, p and what could have been shown."""
    rows = [
        [name, _interval(means), f"{means.p:.3f}", _number(means.detectable), str(means.tasks)] for name, means in means_of(tasks)
    ]
    return Table(title, ["mean over tasks", "mean [95 %]", "p", "detectable", "tasks"], rows)


def means_of(tasks: Sequence[Task]) -> list[tuple[str, Means]]:
    """What is averaged over tasks, in points or percent."""
    rivals = dict.fromkeys(init for task in tasks for init in task.starts if init != "mashup")
    found = [
        (f"{what}, mashup minus {rival}, points", differences(tasks, rival, metric))
        for rival in rivals
        for what, metric in METRICS
    ]
    found += [(f"{what}, %", saved(tasks, column)) for what, column in SAVED]
    kin = [task for task in tasks if task.kin]
    if 0 < len(kin) < len(tasks):
        found += [(f"{what}, with kin, %", saved(kin, column)) for what, column in SAVED]
    return [(name, over_tasks(values)) for name, values in found if values]


METRICS = (
    ("exact match", "exact_match"),
    ("exact match without the end of turn", "answer_match"),
    ("token accuracy", "token_accuracy"),
)
SAVED = (("steps saved", "steps"), ("wall-clock saved, all overhead counted", "seconds"))


def differences(tasks: Sequence[Task], rival: str, metric: str) -> list[float]:
    """Mashup minus a rival in points, one a task: where there are several bases, their mean."""
    pairs = [(task.name, task.of("mashup"), task.of(rival)) for task in tasks]
    return _by_name([(name, 100 * (getattr(one, metric) - getattr(two, metric))) for name, one, two in pairs if one and two])


def saved(tasks: Sequence[Task], column: str) -> list[float]:
    """Percent of the base's steps or seconds, one a task."""
    return _by_name([(task.name, 100 * (_steps(task) if column == "steps" else _seconds(task))) for task in tasks])


def paper_table(base: str, tasks: Sequence[Task]) -> Table:
    """The paper's own accounting beside all overhead, for the starts that have donors."""
    inits = [init for init in ("paper", "mashup") if any(init in task.by_paper for task in tasks)]
    rows = []
    for init in inits:
        found = [(task.by_paper[init], task.by_paper["base"]) for task in tasks if init in task.by_paper]
        times = [one.time for one, _ in found if one.time is not None]
        cells = [
            f"{100 * fmean(base.accuracy for _, base in found):.1f}",
            f"{100 * fmean(one.accuracy for one, _ in found):.1f}",
            f"{100 * fmean(one.parity for one, _ in found):.1f}",
            f"{100 * fmean(times):.1f}" if len(times) == len(found) else "not measured",
            f"{100 * fmean(one.time_all for one, _ in found):.1f}",
        ]
        rows.append([init, *cells, str(len(found))])
    heads = [
        "start",
        "base, accuracy %",
        "start, accuracy %",
        "steps to parity, %",
        "time, one donor charged, %",
        "time, all charged, %",
        "tasks",
    ]
    return Table(f"{base}: by the paper's accounting, on the validation split", heads, rows)


def notes_of(base: str, tasks: Sequence[Task], arms: Sequence[StudyArm]) -> list[str]:
    """What a reader must know of a base's figures."""
    alone, machines = sum(not task.kin for task in tasks), sorted({arm.machine for arm in arms if arm.base == base})
    worse = [task.name for task in tasks if task.worse]
    notes = [f"{base}: {len(tasks)} tasks, {alone} without kin; worse than the base beyond noise: {', '.join(worse) or 'none'}."]
    if len(tasks) < TASKS or alone < WITHOUT_KIN:
        notes.append(f"{base}: fewer than the {TASKS} tasks, {WITHOUT_KIN} of them without kin, that the study should have.")
    if len(machines) > 1:
        notes.append(f"{base}: seconds are of several machines: {'; '.join(machines)}.")
    return notes


def draw_curves(arms: Sequence[StudyArm]) -> Figure:
    """Validation curves of every task of a base, each start at the rate that validation chose, means over seeds."""
    names = list(dict.fromkeys(arm.task for arm in arms))
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * height + 0.6), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    shown: dict[str, Any] = {}
    for panel, name in zip(panels, names, strict=False):
        for init in dict.fromkeys(arm.init for arm in arms if arm.task == name and arm.is_chosen):
            seeds = [arm for arm in arms if (arm.task, arm.init) == (name, init) and arm.is_chosen]
            steps = max((arm.steps for arm in seeds), key=len)
            means = [fmean(arm.validation_nll[min(place, len(arm.steps) - 1)] for arm in seeds) for place in range(len(steps))]
            style = {"color": COLOURS.get(init, OTHER_COLOUR), "marker": MARKERS.get(init, "."), "markersize": 4}
            (shown[init],) = panel.plot(steps, means, linewidth=1.4, **style)
        panel.set_title(name, fontsize=9)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.5)))  # no crowd on an axis of two decades
        panel.tick_params(axis="y", which="both", labelsize=8)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=max(1, len(shown)), fontsize=10)
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("validation NLL, nats a token", fontsize=10)
    return figure


def _steps(task: Task) -> float:
    mashup = task.of("mashup")
    return 0.0 if task.verdict == "base" or mashup is None or mashup.parity is None else 1 - mashup.parity


def _seconds(task: Task) -> float:
    mashup = task.of("mashup")
    return -task.overhead_seconds / task.base_seconds if task.verdict == "base" or mashup is None else mashup.seconds_saved


def _by_name(values: Sequence[tuple[str, float]]) -> list[float]:
    names = dict.fromkeys(name for name, _ in values)
    return [fmean(value for name, value in values if name == one) for one in names]


def _parity(task: Task) -> str:
    mashup = task.of("mashup")
    if task.verdict == "base":
        return "verdict base"
    return "not reached" if mashup is None or mashup.parity is None else f"{mashup.parity:.2f}"


def _cell(found: Figures | None) -> str:
    """Test NLL and exact match in %, this with its spread over seeds where there are several."""
    if found is None:
        return ""
    spread = "" if found.exact_match_spread is None else f" ± {100 * found.exact_match_spread:.1f}"
    return f"{found.nll:.3f}, {100 * found.exact_match:.1f}{spread}"


def _interval(means: Means) -> str:
    return f"{means.mean:+.2f} [{means.low:+.2f}, {means.high:+.2f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _tex(text: str) -> str:
    special = {"±": r"$\pm$", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$"}
    return re.sub(r"[±%_&#$]", lambda match: special[match[0]], text)


def _file_name(base: str) -> str:
    return re.sub(r"[^\w.-]+", "-", base)


if __name__ == "__main__":
    typer.run(main)
