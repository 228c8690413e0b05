"""What do past targets save of a search, and what do they cost it? On losses that are sampled; the rules are the real ones.

    python -m benchmarks.past_targets [--adapters 1024] [--targets 8] [--world "own 0.3"]

Each of `--targets` new targets is searched with 0 to 12 past ones in the store, of which every adapter's losses on the first rung
are known. Adapters have skills, of which a target asks for some, and a part of their own on each target, which nothing foretells;
samples are of differing difficulty, tell adapters apart to differing degrees, and have noise. WORLDS says how much of each, so
that no rule is fitted to one of them. Printed for each number of past targets, one JSON object a line:
    cost_share      adapter-samples, those of the probes among them / adapters x samples; the mean over the new targets
    first_rung_share    of it, what the first rung took
    recall_at_3, recall_at_8    of the best by their mean over all search samples, how many went through to the end
    entrants        share of the adapters that race
    correlation     of foretold and true losses; NaN where too little is known for a prediction
"""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.search.past_targets import AUDITED, MIN_SAMPLES, RISK, probe
from pipeline.search.prediction import components
from pipeline.search.race import FIRST_RUNG, Floats, Race, finalists, make_schedule

N_SEARCH, N_HOLDOUT, TOKENS = 96, 32, 10
PAST = (0, 1, 3, 4, 8, 12)


@dataclass(frozen=True)
class World:
    """How adapters and targets are made. `own`: share of the variance that is of adapter and target together; `skills`: how many;
    `noise`: of an adapter on a sample, in nats a token; `tails`: degrees of freedom of Student's t, of which all that is drawn is
    (None: normal); `kin`: donors near which the adapters are made, as `benchmarks.scale` makes them (0: each for itself);
    `asking`: how far samples of one target differ in the skills that they ask for, as a share of what targets do."""

    own: float = 0.1
    skills: int = 8
    noise: float = 0.4
    tails: int | None = None
    kin: int = 0
    asking: float = 0.0


WORLDS = {
    "usual": World(),
    "own 0.3": World(own=0.3),
    "own 0.6": World(own=0.6),
    "2 skills": World(skills=2),
    "24 skills": World(own=0.2, skills=24),
    "little noise": World(noise=0.15),
    "much noise": World(noise=0.8),
    "heavy tails": World(own=0.2, tails=3),
    "18 donors": World(kin=18),
    "18 donors, heavy tails": World(own=0.3, tails=3, kin=18),
    "samples differ": World(asking=1.0),
}


def main(
    adapters: Annotated[int, typer.Option(help="In the pool.")] = 1024,
    targets: Annotated[int, typer.Option(help="New targets.")] = 8,
    world: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(WORLDS)}. Default: usual.")] = None,
) -> None:
    """Search made targets with and without a past."""
    for name in world or ["usual"]:
        made = [sampled_targets(seed, adapters, max(PAST) + 1, WORLDS[name]) for seed in range(targets)]
        for past in PAST:
            found = [searched(one[:past], one[-1], seed) for seed, one in enumerate(made)]
            means = {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}
            print(json.dumps({"world": name, "past_targets": past, "adapters": adapters, **means}), flush=True)


def sampled_targets(seed: int, adapters: int, targets: int, world: World) -> list[Floats]:
    """Losses of adapters (the first: the base) on the samples of each target, in nats, shape (N + 1, S)."""
    generator = np.random.default_rng(seed)
    skills, harm = _adapters(generator, adapters, world)
    return [_sampled(generator, skills, harm, world) for _ in range(targets)]


def _adapters(generator: np.random.Generator, count: int, world: World) -> tuple[Any, Any]:
    """Each adapter's skills, and what it does harm on any target."""
    skills = _drawn(generator, (count, world.skills), world) - 0.3
    harm = generator.gamma(2.0, 0.4, count)
    if not world.kin:
        return skills, harm
    donor, size, noise = (
        generator.integers(world.kin, size=count),
        generator.uniform(0.1, 1, count),
        generator.uniform(0.02, 0.6, count),
    )
    of_donors = 1.5 * _drawn(generator, (world.kin, world.skills), world)
    near = of_donors[donor] * size[:, None] + 0.15 * _drawn(generator, (count, world.skills), world)
    return near, 4 * noise**2 + size * generator.gamma(2.0, 0.2, world.kin)[donor]


def _sampled(generator: np.random.Generator, skills: Any, harm: Any, world: World) -> Floats:
    wanted = generator.dirichlet(np.full(world.skills, 0.3))
    shared = harm - 0.6 * skills @ wanted
    alone = _drawn(generator, len(skills), world) * shared.std()
    effect = np.sqrt(1 - world.own) * shared + np.sqrt(world.own) * alone
    samples = N_SEARCH + N_HOLDOUT
    difficulty, asks = generator.gamma(3.0, 0.6, samples), generator.gamma(2.0, 0.5, samples)
    noise = world.noise * _drawn(generator, (len(skills), samples), world)
    if world.asking:
        asked = generator.dirichlet(np.full(world.skills, 0.3), samples)
        noise = noise - 0.6 * world.asking * skills @ (asked - asked.mean(axis=0)).T
    losses = np.vstack([difficulty, np.maximum(difficulty + effect[:, None] * asks + noise, 0.01)])
    return (losses * TOKENS).astype(np.float32)


def _drawn(generator: np.random.Generator, shape: Any, world: World) -> Any:
    """With a variance of 1."""
    if world.tails is None:
        return generator.standard_normal(shape)
    return generator.standard_t(world.tails, shape) * math.sqrt((world.tails - 2) / world.tails)


def searched(past: list[Floats], new: Floats, seed: int) -> dict[str, float]:
    """One search, and what became of the best."""
    racing, correlation, risk = np.arange(1, len(new)), np.nan, 0.0
    if len(past) * FIRST_RUNG >= MIN_SAMPLES:
        racing, correlation = _entrants(past, new, seed)
        risk = RISK if len(racing) < len(new) - 1 else 0.0
    seen = _raced(new[np.concatenate([[0], racing])], risk)
    best = np.argsort(new[1:, :N_SEARCH].sum(axis=1))[:8] + 1
    through = {int(row) for row, end in zip(racing, seen[1:], strict=True) if end == new.shape[1]}
    return {
        "cost_share": seen[1:].sum() / new[1:].size,
        "first_rung_share": np.minimum(seen[1:], FIRST_RUNG).sum() / new[1:].size,
        "recall_at_3": float(np.mean([int(one) in through for one in best[:3]])),
        "recall_at_8": float(np.mean([int(one) in through for one in best])),
        "entrants": len(racing) / (len(new) - 1),
        "correlation": correlation,
    }


def _entrants(past: list[Floats], new: Floats, seed: int) -> tuple[Any, float]:
    """Rows of those who race, and the correlation."""
    first = slice(0, FIRST_RUNG)
    parts = components(np.concatenate([(one[1:, first] - one[0, first]) / TOKENS for one in past], axis=1).astype(np.float64))
    loss = ((new[1:, first] - new[0, first]).mean(axis=1) / TOKENS).astype(np.float64)
    probes, foretold = probe(parts, finalists(len(parts)), lambda rows: loss[rows])
    unlikely = np.setdiff1d(np.arange(len(parts)), probes)
    audited = np.random.default_rng(seed).permutation(unlikely)[: math.ceil(AUDITED * len(unlikely))]
    truth, told = new[1:, :N_SEARCH].mean(axis=1), np.isfinite(foretold)
    return np.sort(np.append(probes, audited)) + 1, float(np.corrcoef(foretold[told], truth[told])[0, 1])


def _raced(nll: Floats, risk: float) -> Any:
    """Samples that each candidate sees in a race within a tenth: who goes on depends on the scores alone, and all are known."""
    schedule = make_schedule(len(nll), N_SEARCH, N_HOLDOUT, 0.1, risk=risk)
    return Race(schedule, [TOKENS] * nll.shape[1], nll).seen_N()


if __name__ == "__main__":
    typer.run(main)
