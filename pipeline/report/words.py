"""Numbers and verdicts in plain words: the page, the terminal and the model card say the same thing the same way."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import HARNESS
from pipeline.config import METHODS as MERGE_METHODS

Json = Mapping[str, Any]

DASH = "–"
"""Shown for a number that is not there."""

METHODS = {name: method.sentence for name, method in MERGE_METHODS.items()}

METRICS = {
    "choices": (
        "Accuracy by option likelihood",
        "The share of rows whose right choice has the highest log-likelihood given the prompt, summed over its tokens without "
        "the end of the turn.",
    ),
    "choices_per_token": (
        "Accuracy by option likelihood a token",
        "The share of rows whose right choice has the highest mean log-likelihood a token given the prompt, without the end of "
        "the turn.",
    ),
    "exact_match": (
        "Exact match of written answers",
        "The share of rows of which the answer that is decoded greedily equals the right one, both in lower case and without "
        "articles, repeated blanks and punctuation outside of numbers, much as SQuAD's evaluation compares them.",
    ),
}
"""What each `compare.metric` is called, and what it is; a function has its own name."""


@dataclass(frozen=True)
class Measure:
    """A metric of the test split: its key in an init's summary, its name, and how it and a difference of it are written."""

    key: str
    name: str
    write: Callable[[float | None], str]
    difference: Callable[[float], str]
    meaning: str = ""


@dataclass(frozen=True)
class Headline:
    """A number that a reader looks for first, and what it is measured against."""

    name: str
    value: str
    detail: str


def is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def nll(value: float | None) -> str:
    """A loss in nats a token."""
    return f"{value:.4f}" if is_number(value) else DASH


def signed(value: float | None) -> str:
    """A difference of losses, with a true minus sign."""
    return f"{value:+.4f}".replace("-", "−") if is_number(value) else DASH


def percent(value: float | None) -> str:
    return f"{100 * value:.1f} %" if value is not None and is_number(value) else DASH


def points(share: float) -> str:
    """A difference of shares in percentage points, with a true minus sign."""
    return f"{100 * share:+.1f} points".replace("-", "−")


TEST_MEASURES = (
    Measure("test_exact_match", "Exact match on the test split", percent, points),
    Measure("test_token_accuracy", "Token accuracy on the test split", percent, points),
    Measure("test_nll", "NLL on the test split", nll, signed),
)


def measures(summary: Json) -> Sequence[Measure]:
    """What was measured on the test split; the metric that was asked for comes first."""
    asked = summary.get("metric")
    return (*([asked_measure(asked)] if asked else []), *TEST_MEASURES)


def asked_measure(metric: str) -> Measure:
    """What `compare.metric` asked for."""
    if metric in METRICS:
        name, meaning = METRICS[metric]
        return Measure("test_metric", f"{name} on the test split", percent, points, meaning)
    if metric.startswith(HARNESS):
        return Measure("test_metric", single_line(metric), nll, signed, "The mean of this task's first metric, on its own rows.")
    name, meaning = f"{single_line(metric)} on the test split", "The mean of what this function gives for the answers written."
    return Measure("test_metric", name, nll, signed, meaning)


def duration(seconds: float | None) -> str:
    """`8.4 s`, `5 min 12 s` or `2 h 05 min`."""
    if seconds is None or not is_number(seconds):
        return DASH
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return "{} min {:02} s".format(*divmod(round(seconds), 60))
    return "{} h {:02} min".format(*divmod(round(seconds / 60), 60))


def size(n_bytes: float) -> str:
    """`0 B`, `8.4 MB`, `1.2 TB`: powers of 1000."""
    power = min(4, int(math.log10(n_bytes) / 3)) if n_bytes >= 1 else 0
    return f"{n_bytes / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def ratio(value: float | None) -> str:
    return f"x {value:.2f}" if value is not None and is_number(value) else DASH


def rate(value: float) -> str:
    """A learning rate: `5e-4`, not `0.0005` or `5e-04`."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def step(value: float) -> str:
    """A step, interpolated or whole: `29.3`, `1,200`."""
    return f"{round(value, 1):,g}"


def steps(value: float) -> str:
    return "1 step" if value == 1 else f"{step(value)} steps"


def has_parity(inits: Json) -> bool:
    """Whether one may ask when a start reaches the end of the base: not where a hedge stopped one of them."""
    return not any(map(stopped_at, inits.values()))


def parity_step(arm: Json) -> str:
    """The step at which an init reaches the base run's final validation loss."""
    if "parity_steps" not in arm:
        return DASH
    return "not reached" if arm["parity_steps"] is None else step(arm["parity_steps"])


def final_nll(arm: Json) -> str:
    """The validation NLL at the end of an init, wherever that was."""
    end = nll(arm["validation_nll_final"])
    return f"{end} (stopped)" if stopped_at(arm) else end


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def single_line(text: object) -> str:
    """`text` with every run of whitespace and control characters as one space: an adapter's id may hold anything."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(text)).strip()


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, the middle left out: ids often differ at their ends."""
    text = single_line(text)
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def unbroken(text: str) -> str:
    """`text` with no line break between a number and its unit, or after a plus-minus sign."""
    return re.sub(r"(?<=\d) (?=(%|s|min|h)\b|%)|(?<=±) ", "\N{NO-BREAK SPACE}", text)


def parity_of(summary: Json | None) -> Json | None:
    """What is known of parity; None where no mashup was trained against the base."""
    return (summary.get("parity") or None) if summary and summary["verdict"] == "mashup" else None


def hedge_of(summary: Json | None) -> Json | None:
    """What a hedge decided; None where there was none."""
    return summary.get("hedge") if summary else None


def stopped_at(arm: Json) -> int | None:
    """The step at which a hedge stopped a start."""
    return arm.get("stopped_at")


def verdict(summary: Json | None, selection: Json | None) -> str:
    """What came out of the run, in a sentence or two. Slower, or parity not reached, is said as plainly as a gain."""
    found = summary or selection
    if not found:
        return "No donors have been chosen yet: the search has not been run."
    if found["verdict"] == "base":
        return f"Start from the base: {found['why']}.{_cost_clause(summary)}{_reused_clause(summary)}"
    mashup = f"mashup of {count(len(found['donors']), 'donor')}"
    parity = parity_of(summary)
    if hedge := hedge_of(summary):
        return _decision(hedge, mashup)
    if not parity:
        return f"A {mashup} was made: {found['why']}. It has not been compared with the base yet."
    if not parity["reached"]:
        return f"The {mashup} does not reach the base's final validation loss within {steps(parity['base_steps'])}."
    when = f"after {step(parity['steps'])} of {steps(parity['base_steps'])}"
    return f"The {mashup} reaches the base's final validation loss {when}.{_time_clause(parity)}{_reused_clause(summary)}"


def foretold(summary: Json | None, selection: Json | None) -> str | None:
    """What past runs say of the verdict, or of the decision of a hedge; None: there is none that they could speak of."""
    hedge = hedge_of(summary)
    found, what = ((summary or {}).get("foretold"), "decisions") if hedge else ((selection or {}).get("foretold"), "verdicts")
    if not found:
        return None
    if "right" not in found:
        known = f"{count(found['runs'], 'past run')} with this base on other targets"
        return f"How often such {what} are right is not known: {known}, and it takes eight or more (search.store)."
    low, high = found["interval"]
    right = f"{found['right']} were right ({percent(low)} to {percent(high)} with 95 % confidence)"
    gain = f"{signed(found['gain'])} ± {nll(found['spread'])} nats a token"
    return (
        f"Of {found['runs']} such {what} of past runs with this base {right}; by them the mashup's validation NLL is expected to "
        f"end below the base's by {gain}."
    )


def pays(parity: Json | None) -> str | None:
    """From which training time on the mashup wins, and where this run's lies; None: nothing is known of it."""
    if not parity or "break_even_seconds" not in parity or not parity["reached"]:
        return None
    here = f"here it took {duration(parity['base_seconds'])}"
    if parity["break_even_seconds"] is None:
        return f"It does not pay however long the training is: it saves no training time ({here})."
    return (
        f"It pays where training from the base takes {duration(parity['break_even_seconds'])} or longer, if as large a share of "
        f"it is saved; {here}."
    )


def pays_by_past_runs(pays: Json | None) -> str | None:
    """Of a plan: when the mashup pays, as far as past runs on this base tell; None: it is not compared with the base."""
    if not pays:
        return None
    overhead, here = pays["overhead_seconds"], pays["base_seconds"]
    if overhead is not None and here is not None and overhead >= here:
        known = f"finding donors takes up to {duration(overhead)}, all of training from the base {duration(here)}"
        return f"It will not pay in time at this budget, whatever it saves: {known}.{_saved_before(pays)}"
    if not pays["past_runs"]:
        spent = "" if overhead is None else f" Finding donors takes up to {duration(overhead)}."
        return f"Whether it pays is not known: no other run on this base has ended with this score store (search.store).{spent}"
    if "seconds" not in pays:
        return f"Whether it pays is not known, as nobody measured how fast this cluster is.{_saved_before(pays)}"
    if pays["break_even_seconds"] is None:
        return f"It will not pay in time, if it goes as before.{_saved_before(pays)}"
    even, to_parity = duration(pays["break_even_seconds"]), duration(pays["seconds"])
    return (
        f"If it goes as before, it pays where training from the base takes {even} or longer; here it takes {duration(here)}, and "
        f"the mashup's way to parity {to_parity}, of which {duration(overhead)} are finding donors "
        f"({compared_time(pays['seconds_saved'])}).{_saved_before(pays)}"
    )


def _saved_before(pays: Json) -> str:
    if not pays["past_runs"]:
        return ""
    runs = f"{count(pays['past_runs'], 'past run')} on this base, {pays['mashups']} of them with a mashup"
    return f" Before: {runs}; on average {percent(pays['steps_saved'])} of the steps were saved."


def _cost_clause(summary: Json | None) -> str:
    """What it cost to learn that no donor helps."""
    cost = (summary or {}).get("verdict_cost")
    if not cost:
        return ""
    share = "" if cost["share_of_base"] is None else f", {percent(cost['share_of_base'])} of what training from the base took"
    return f" To learn that took {duration(cost['seconds'])}{share}."


def _reused_clause(summary: Json | None) -> str:
    """What the overhead leaves out."""
    reused = (summary or {}).get("scores_reused")
    if not reused:
        return ""
    return (
        f" Of the {reused['of']} scores that the search used {reused['count']} were there before it, from a plan or from other "
        "runs: the time that these took is not counted."
    )


def headlines(summary: Json) -> list[Headline]:
    """The figures on top of the page, parity first."""
    parity, hedge, inits = parity_of(summary), hedge_of(summary), summary["inits"]
    if hedge:
        first = [_went_on(hedge), _hedge_cost(hedge, summary)]
    else:
        first = [_steps(parity), _wall_clock(parity, summary)] if parity else [_search_cost(summary)]
    return first + [_test(measure, inits) for measure in measures(summary)]


def passes(summary: Json) -> str | None:
    """How large training passes were; sizes that were found by running out of memory are said with the arms that did."""
    sizes = {name: tuple(found) for arm in summary["inits"].values() for name, found in arm.get("tokens_per_pass", {}).items()}
    if not sizes:
        return None
    kinds = {kind: [name for name, found in sizes.items() if found == kind] for kind in dict.fromkeys(sizes.values())}
    said = [_pass_size(kind) + (f" ({', '.join(names)})" if len(kinds) > 1 else "") for kind, names in kinds.items()]
    return f"Padded tokens in a training pass: {'; '.join(said)}."


def _pass_size(sizes: tuple[int, ...]) -> str:
    first, *smaller = (f"{size:,}" for size in sizes)
    return f"{first}, for want of memory then {', '.join(smaller)}" if smaller else first


def measured(measure: Measure, value: Json | None) -> str:
    """A test metric, with its spread over seeds where there were several."""
    if not value:
        return DASH
    write = measure.write
    spread = value.get("spread")
    return write(value["mean"]) if spread is None else f"{write(value['mean'])} ± {write(spread)}"


def compared_time(share_saved: float | None) -> str:
    """`12.0 % faster`, `12.0 % slower`, `6.4 times as long`, or `as fast`."""
    if share_saved is None:
        return DASH
    if round(abs(share_saved), 3) == 0:
        return "as fast"
    if share_saved < -1:
        return f"{1 - share_saved:.1f} times as long"
    return f"{percent(abs(share_saved))} {'faster' if share_saved > 0 else 'slower'}"


def hedge_cost(summary: Json) -> str | None:
    """What a hedge cost beside a plain finetune; None where there was none."""
    if not (hedge := hedge_of(summary)):
        return None
    cost = _hedge_cost(hedge, summary)
    return f"{cost.name}: {cost.value}, {cost.detail}."


def _decision(hedge: Json, mashup: str) -> str:
    names = {"base": "base", "mashup": mashup}
    sentence = f"The {names[hedge['winner']]} went on to the end; the {names[hedge['stopped']]} was stopped {_stop(hedge)}."
    if hedge["kept"] == hedge["winner"]:
        return sentence
    return f"{sentence} Before that it had weights of a still lower loss, which are kept."


def _stop(hedge: Json) -> str:
    """When a hedge stopped a start, and from what figures."""
    when = f"after {hedge['step']} of {steps(hedge['steps'])}"
    ahead, behind = (hedge["validation_nll"][hedge[which]] for which in ("winner", "stopped"))
    if behind is None:
        return f"{when}, as its training had diverged"
    return f"{when}, at a validation NLL of {nll(behind)} against {nll(ahead)}"


def _went_on(hedge: Json) -> Headline:
    return Headline("The start that went on", hedge["winner"], f"the {hedge['stopped']} was stopped {_stop(hedge)}")


def _hedge_cost(hedge: Json, summary: Json) -> Headline:
    """Against the start that went on, trained alone; what went into finding donors stands beside it."""
    tokens, seconds = hedge["cost"]["tokens"], hedge["cost"]["seconds"]
    detail = (
        f"{tokens['spent']:,.0f} tokens in place of {tokens['plain']:,.0f}, {duration(seconds['spent'])} of training in place of "
        f"{duration(seconds['plain'])}; {duration(summary['overhead_seconds']['total'])} went into finding and merging donors"
    )
    return Headline("Cost against a plain finetune", f"{percent(hedge['cost']['step']['more'])} more steps", detail)


def _time_clause(parity: Json) -> str:
    saved = parity["seconds_saved"]
    if saved is None:
        return ""
    if round(abs(saved), 3) == 0:
        return " With all overhead counted, that takes as long as training from the base."
    more = f"{percent(abs(saved))} {'less' if saved > 0 else 'more'} time than"
    return f" With all overhead counted, that takes {f'{compared_time(saved)} as' if saved < -1 else more} the base."


def _steps(parity: Json) -> Headline:
    name = "Steps to parity"
    if not parity["reached"]:
        target = f"the base ends at a validation NLL of {nll(parity['target_nll'])}"
        return Headline(name, "not reached", f"in {steps(parity['base_steps'])}{_by_seed(parity)}; {target}")
    saved = parity["steps_saved"]
    detail = f"{percent(saved)} fewer steps to the base's final validation NLL{_by_seed(parity)}"
    return Headline(name, f"{step(parity['steps'])} of {step(parity['base_steps'])}", detail)


def _by_seed(parity: Json) -> str:
    """Where there are several seeds, when each got there by itself."""
    alone = parity.get("steps_by_seed", [])
    return f" (each seed alone: {', '.join('not' if one is None else step(one) for one in alone)})" if len(alone) > 1 else ""


def _wall_clock(parity: Json, summary: Json) -> Headline:
    name, overhead = "Wall-clock to parity, overhead included", duration(summary["overhead_seconds"]["total"])
    if not parity["reached"]:
        return Headline(name, "not reached", f"{overhead} went into finding and merging donors; base {_base_time(parity)}")
    detail = f"{duration(parity['seconds'])}, of which {overhead} finding and merging donors; base {_base_time(parity)}"
    return Headline(name, compared_time(parity["seconds_saved"]), detail)


def _base_time(parity: Json) -> str:
    return f"{duration(parity['base_seconds'])} for {steps(parity['base_steps'])}"


def _search_cost(summary: Json) -> Headline:
    spent = duration((summary.get("overhead_seconds") or {}).get("total"))
    return Headline("Time spent on the pool", spent, "index, samples, search over all candidates, merge")


def _test(measure: Measure, inits: Json) -> Headline:
    name, write = measure.name, measure.write
    base, mashup = ((inits.get(init) or {}).get(measure.key) for init in ("base", "mashup"))
    if not (base and mashup):
        return Headline(name, measured(measure, base or mashup), "base" if base else "mashup")
    change = measure.difference(mashup["mean"] - base["mean"])
    spreads = [write(arm["spread"]) for arm in (base, mashup) if arm.get("spread") is not None]
    over_seeds = f"; over seeds ± {' and ± '.join(spreads)}" if spreads else ""
    return Headline(name, f"{write(base['mean'])} → {write(mashup['mean'])}", f"base → mashup: {change}{over_seeds}")
