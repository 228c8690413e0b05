"""The tasks of the demo: fourteen that its donor adapters were trained on, and one, the target, that is new to them.

Rows are {"prompt": ..., "completion": ...}, made from templates, arithmetic and word lists written for this project. Tasks of a
family put their question alike and differ in content, as in collections of real tasks. The target, the verdict of gadget
reviews, is of the family of three donors (hotel, restaurant and film reviews) and shares no phrase with them.

    python -m examples.tasks --target .cache/demo-target     # writes train.jsonl, validation.jsonl and test.jsonl
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from examples.reviews import FILM, GADGET, HOTEL, RESTAURANT, Domain
from examples.words import ADJECTIVES, CITIES, MONTHS, PEOPLE, PLURALS, THINGS, in_words

Row = dict[str, str]
Maker = Callable[[Random], Row]

TARGET_SPLITS = {"train": 400, "validation": 64, "test": 200}

LENGTHS = (("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("centimetres", "millimetres", 10))
MASSES = (("kilograms", "grams", 1000), ("tonnes", "kilograms", 1000), ("grams", "milligrams", 1000))
TIMES = (("hours", "minutes", 60), ("weeks", "days", 7), ("years", "months", 12), ("minutes", "seconds", 60))


def review(domain: Domain) -> Maker:
    """Which aspect of a thing a review is about, and whether it praises it, blames it or does both."""

    def make(random: Random) -> Row:
        name, aspect = random.choice(list(domain.aspects.items()))
        praise, blame = random.choice(aspect.praise), random.choice(aspect.blame)
        said, verdict = random.choice([(praise, "good"), (blame, "bad"), (f"{praise} but {blame}", "mixed")])
        text = f"{random.choice(domain.openings)} {random.choice(aspect.subjects)} {said}."
        return {"prompt": f"Review: {text}\nAspect and verdict?", "completion": f"{name}: {verdict}"}

    return make


def convert(units: tuple[tuple[str, str, int], ...]) -> Maker:
    """A whole number of a unit in a smaller unit."""

    def make(random: Random) -> Row:
        large, small, factor = random.choice(units)
        number = random.randint(2, 299)
        return {"prompt": f"Convert {number} {large} to {small}.", "completion": f"{number * factor} {small}"}

    return make


def add(random: Random) -> Row:
    one, other = random.randint(1, 49), random.randint(1, 49)
    return {"prompt": f"What is {in_words(one)} plus {in_words(other)}?", "completion": in_words(one + other)}


def subtract(random: Random) -> Row:
    small, large = sorted((random.randint(1, 70), random.randint(1, 70)))
    return {"prompt": f"What is {in_words(large)} minus {in_words(small)}?", "completion": in_words(large - small)}


def iso_date(random: Random) -> Row:
    year, month, day = random.randint(1950, 2030), random.randint(1, 12), random.randint(1, 28)
    prompt = f"Write {day} {MONTHS[month - 1]} {year} as an ISO date."
    return {"prompt": prompt, "completion": f"{year}-{month:02}-{day:02}"}


def clock(random: Random) -> Row:
    hour, minute = random.randint(0, 23), random.randint(0, 59)
    prompt = f"Write {hour % 12 or 12}:{minute:02} {'pm' if hour >= 12 else 'am'} as 24-hour time."
    return {"prompt": prompt, "completion": f"{hour:02}:{minute:02}"}


def extract(field: str) -> Maker:
    """One field of a short note: who, where or what."""

    def make(random: Random) -> Row:
        note = {"person": random.choice(PEOPLE), "city": random.choice(CITIES), "goods": random.choice(THINGS)}
        form = random.choice(
            ("{person} from {city} ordered {goods}.", "Send {goods} to {person} in {city}.", "{city}: {goods} for {person}.")
        )
        return {"prompt": f"Note: {form.format(**note)}\nGive the {field}.", "completion": note[field]}

    return make


def plural(random: Random) -> Row:
    one, other = random.sample(list(PLURALS), 2)
    return {"prompt": f"Words: {one}, {other}\nGive the plurals.", "completion": f"{PLURALS[one]}, {PLURALS[other]}"}


def initials(random: Random) -> Row:
    words = [*random.sample(ADJECTIVES, 2), random.choice(THINGS)]
    return {"prompt": f"Words: {', '.join(words)}\nGive the initials.", "completion": ", ".join(word[0] for word in words)}


DONORS: dict[str, Maker] = {
    "reviews-hotels": review(HOTEL),
    "reviews-restaurants": review(RESTAURANT),
    "reviews-films": review(FILM),
    "units-length": convert(LENGTHS),
    "units-mass": convert(MASSES),
    "units-time": convert(TIMES),
    "sums-plus": add,
    "sums-minus": subtract,
    "dates-iso": iso_date,
    "dates-clock": clock,
    "notes-city": extract("city"),
    "notes-goods": extract("goods"),
    "words-plural": plural,
    "words-initials": initials,
}
TARGET = review(GADGET)


def draw(make: Maker, seed: str, count: int) -> list[Row]:
    """`count` rows of a task with distinct prompts, the same ones for the same seed."""
    random = Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = make(random)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def donor_rows(task: str, train: int, heldout: int) -> tuple[list[Row], list[Row]]:
    """Rows of a donor's task to train on, and others to measure it on."""
    rows = draw(DONORS[task], task, train + heldout)
    return rows[:train], rows[train:]


def write_target(folder: Path) -> None:
    """Write the target's three splits; no prompt is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = iter(draw(TARGET, "target", sum(TARGET_SPLITS.values())))
    for split, count in TARGET_SPLITS.items():
        lines = [json.dumps(next(rows)) + "\n" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's target task.")
    parser.add_argument("--target", type=Path, required=True, help="folder to write train, validation and test.jsonl to")
    write_target(parser.parse_args().target)


if __name__ == "__main__":
    main()
