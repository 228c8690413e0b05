"""Numbers and verdicts in words: units, signs, and no softening of a loss."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.report import words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.44, "8.4 s"), (59.97, "1 min 00 s"), (312, "5 min 12 s"), (3599.9, "1 h 00 min"), (7500, "2 h 05 min"), (None, "–")],
)
def test_a_duration_is_written_with_its_units(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (8_437_000, "8.4 MB"), (2.5e12, "2.5 TB"), (1e16, "10000.0 TB")],
)
def test_a_size_is_written_with_its_unit(n_bytes: float, text: str) -> None:
    assert words.size(n_bytes) == text


@pytest.mark.parametrize(("value", "text"), [(5e-4, "5e-4"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (0.01, "1e-2")])
def test_a_learning_rate_is_short(value: float, text: str) -> None:
    assert words.rate(value) == text


@pytest.mark.parametrize(("value", "text"), [(29.27, "29.3"), (100.0, "100"), (1234.5, "1,234.5"), (20_000, "20,000")])
def test_a_step_is_never_in_exponent_form(value: float, text: str) -> None:
    assert words.step(value) == text


def test_numbers_that_are_not_there_are_a_dash() -> None:
    assert {words.nll(None), words.nll(math.nan), words.signed(math.inf), words.percent(None), words.ratio(None)} == {words.DASH}


def test_a_long_id_keeps_both_ends() -> None:
    assert words.shorten("organisation/task-name-r16-seed3", 16) == "organis…16-seed3"
    assert words.shorten("a\n\x1b[31mb", 16) == "a [31mb"


def test_a_slower_mashup_is_said_to_be_slower(summary: dict[str, Any]) -> None:
    assert "29.3 of 100 steps" in words.verdict(summary, None)
    assert "40.2 % more time than the base" in words.verdict(summary, None)
    assert words.headlines(summary)[1].value == "40.2 % slower"
    summary["parity"]["seconds_saved"] = -5.4
    assert words.verdict(summary, None).endswith("that takes 6.4 times as long as the base.")
    assert words.headlines(summary)[1].value == "6.4 times as long"


def test_a_faster_mashup_is_said_to_be_faster(summary: dict[str, Any]) -> None:
    summary["parity"]["seconds_saved"] = 0.25
    assert "25.0 % less time than the base" in words.verdict(summary, None)
    assert words.headlines(summary)[1].value == "25.0 % faster"


def test_parity_that_is_not_reached_is_said_first(summary: dict[str, Any], lose_parity: Callable[[dict[str, Any]], None]) -> None:
    lose_parity(summary)
    assert "does not reach the base's final validation loss within 100 steps" in words.verdict(summary, None)
    assert [headline.value for headline in words.headlines(summary)[:2]] == ["not reached", "not reached"]


def test_scores_that_were_there_before_are_said_to_be_left_out_of_the_time(summary: dict[str, Any]) -> None:
    assert "were there before" not in words.verdict(summary, None)
    said = words.verdict(summary | {"scores_reused": {"count": 40, "of": 72}}, None)
    assert said.endswith(
        " Of the 72 scores that the search used 40 were there before it, from a plan or from other runs: the time that these "
        "took is not counted."
    )


def test_it_is_said_from_when_on_it_pays(summary: dict[str, Any], lose_parity: Callable[[dict[str, Any]], None]) -> None:
    said = words.pays(summary["parity"])
    assert said is not None
    assert said.startswith("It pays where training from the base takes 10 min 43 s or longer")
    assert said.endswith("here it took 6 min 50 s.")
    assert "however long" in str(words.pays(summary["parity"] | {"break_even_seconds": None}))
    del summary["parity"]["break_even_seconds"]  # of an older version
    assert words.pays(summary["parity"]) is None
    lose_parity(summary)
    assert words.pays(words.parity_of(summary)) is None


def test_a_hedge_says_who_went_on_from_what_figures_and_what_it_cost(hedged: Callable[..., dict[str, Any]]) -> None:
    found = hedged("base")
    said = words.verdict(found, None)
    assert said == (
        "The mashup of 3 donors went on to the end; the base was stopped after 33 of 100 steps, at a validation NLL of 0.9000 "
        "against 0.7000."
    )
    first, cost, *tests = words.headlines(found)
    assert (first.value, cost.value) == ("mashup", "33.0 % more steps")
    assert cost.detail.startswith("13,300 tokens in place of 10,000, 1 min 06 s of training in place of 50.0 s; 7 min 35 s went")
    assert [one.detail for one in tests] == ["mashup"] * 3
    assert str(words.hedge_cost(found)).startswith("Cost against a plain finetune: 33.0 % more steps, 13,300 tokens")
    assert "parity" not in " ".join([said, *(one.name for one in words.headlines(found))])
    assert not words.has_parity(found["inits"])


def test_weights_of_the_start_that_was_stopped_are_told_where_they_are_kept(hedged: Callable[..., dict[str, Any]]) -> None:
    found = hedged("mashup", kept="mashup")
    assert words.verdict(found, None).endswith("Before that it had weights of a still lower loss, which are kept.")
    found["hedge"]["validation_nll"]["mashup"] = None
    assert "after 33 of 100 steps, as its training had diverged." in words.verdict(found, None)


def test_what_past_runs_say_of_a_verdict_is_told_with_its_interval(hedged: Callable[..., dict[str, Any]]) -> None:
    known = {"runs": 12, "right": 10, "interval": (0.552, 0.953), "gain": 0.12, "spread": 0.05}
    assert words.foretold(None, {"verdict": "base"}) is None
    assert words.foretold(None, {"foretold": known}) == (
        "Of 12 such verdicts of past runs with this base 10 were right (55.2 % to 95.3 % with 95 % confidence); by them the "
        "mashup's validation NLL is expected to end below the base's by +0.1200 ± 0.0500 nats a token."
    )
    assert "is not known: 3 past runs" in str(words.foretold(None, {"foretold": {"runs": 3}}))
    said = words.foretold(hedged() | {"foretold": {"runs": 1}}, {"foretold": known})
    assert said == (
        "How often such decisions are right is not known: 1 past run with this base on other targets, and it takes eight or more "
        "(search.store)."
    )


def test_base_and_mashup_stand_side_by_side(summary: dict[str, Any]) -> None:
    exact = words.headlines(summary)[2]
    assert exact.value == "64.1 % → 66.8 %"
    assert "+2.7 points" in exact.detail


@pytest.mark.parametrize(
    ("metric", "name", "value", "change"),
    [
        ("choices", "Accuracy by option likelihood on the test split", "25.0 % → 75.0 %", "+50.0 points"),
        ("choices_per_token", "Accuracy by option likelihood a token on the test split", "25.0 % → 75.0 %", "+50.0 points"),
        ("exact_match", "Exact match of written answers on the test split", "25.0 % → 75.0 %", "+50.0 points"),
        ("lm_eval:arc_easy", "lm_eval:arc_easy", "0.2500 → 0.7500", "+0.5000"),
        ("own.metrics:f1", "own.metrics:f1 on the test split", "0.2500 → 0.7500", "+0.5000"),
    ],
)
def test_a_metric_of_ones_own_comes_first(
    metric: str, name: str, value: str, change: str, summary: dict[str, Any], add_metric: Callable[..., None]
) -> None:
    """Shares as percent; what a function gives may be anything, and is a number."""
    before = words.headlines(summary)
    add_metric(metric)
    found = words.headlines(summary)
    assert [one for one in found if one not in before] == [found[2]]
    assert (found[2].name, found[2].value) == (name, value)
    assert change in found[2].detail
    assert words.asked_measure(metric).meaning


def test_the_size_of_training_passes_is_said_with_what_ran_out_of_memory(summary: dict[str, Any]) -> None:
    assert words.passes(summary) is None
    base, mashup = (summary["inits"][init] for init in ("base", "mashup"))
    base["tokens_per_pass"], mashup["tokens_per_pass"] = {"a": [8192], "b": [8192]}, {"c": [8192]}
    assert words.passes(summary) == "Padded tokens in a training pass: 8,192."
    mashup["tokens_per_pass"] = {"c": [8192, 4000]}
    assert words.passes(summary) == "Padded tokens in a training pass: 8,192 (a, b); 8,192, for want of memory then 4,000 (c)."


def test_a_run_that_starts_from_the_base_has_no_parity(summary: dict[str, Any], lose_mashup: Callable[..., None]) -> None:
    lose_mashup(summary)
    assert words.verdict(summary, None) == "Start from the base: no donor beats the base."
    assert words.headlines(summary)[0].name == "Time spent on the pool"
    assert "±" in words.headlines(summary)[1].value


def test_a_verdict_needs_no_later_stage(summary: dict[str, Any]) -> None:
    assert "has not been run" in words.verdict(None, None)
    merged = {"verdict": "mashup", "why": "exact-1 wins", "donors": [{}]}
    assert (
        words.verdict(None, merged) == "A mashup of 1 donor was made: exact-1 wins. It has not been compared with the base yet."
    )


PAYS = {"past_runs": 5, "mashups": 4, "steps_saved": 0.4, "overhead_seconds": 50.0, "base_seconds": 200.0}


@pytest.mark.parametrize(
    ("pays", "said"),
    [
        (
            PAYS | {"break_even_seconds": 131.6, "seconds": 174.0, "seconds_saved": 0.13},
            "If it goes as before, it pays where training from the base takes 2 min 12 s or longer; here it takes 3 min 20 s, "
            "and the mashup's way to parity 2 min 54 s, of which 50.0 s are finding donors (13.0 % faster). Before: 5 past runs "
            "on this base, 4 of them with a mashup; on average 40.0 % of the steps were saved.",
        ),
        (PAYS | {"break_even_seconds": None, "seconds": 250.0, "seconds_saved": -0.25}, "It will not pay in time, if it goes as"),
        (
            PAYS | {"overhead_seconds": 210.0},
            "It will not pay in time at this budget, whatever it saves: finding donors takes up to",
        ),
        (
            PAYS | {"base_seconds": None},
            "Whether it pays is not known, as nobody measured how fast this cluster is. Before: 5 past",
        ),
        (PAYS | {"past_runs": 0}, "Whether it pays is not known: no other run on this base has ended with this score store"),
    ],
)
def test_a_plan_says_when_it_pays_or_that_it_does_not_know(pays: dict[str, Any], said: str) -> None:
    text = words.pays_by_past_runs(pays)
    assert text is not None
    assert text.startswith(said)


def test_a_plan_without_both_starts_says_nothing_of_it() -> None:
    assert words.pays_by_past_runs(None) is None


def test_a_base_verdict_says_what_it_cost(summary: dict[str, Any], lose_mashup: Callable[[dict[str, Any]], None]) -> None:
    lose_mashup(summary)
    assert "To learn that" not in words.verdict(summary, None)
    summary["verdict_cost"] = {"seconds": 53.0, "share_of_base": 0.1234}
    assert words.verdict(summary, None).endswith("To learn that took 53.0 s, 12.3 % of what training from the base took.")
    summary["verdict_cost"]["share_of_base"] = None
    assert words.verdict(summary, None).endswith("To learn that took 53.0 s.")
