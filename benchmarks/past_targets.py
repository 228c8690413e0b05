"""What do past targets save of a search, and what do they cost it? On losses that are sampled; the rules are the real ones.

    python -m benchmarks.past_targets [--adapters 1024] [--targets 8]

Each of `--targets` new targets is searched with 0, 4, 8 and 12 past ones in the store, of which every adapter's losses on the
first rung are known. Adapters have skills, of which a target asks for some, and a part of their own on each target (`--own`, its
share of the variance) that nothing foretells; samples are of differing difficulty and have noise. Printed for each number of
past targets, one JSON object a line:
    cost_share      adapter-samples, those of the probes among them / adapters x samples; the mean over the new targets
    recall_at_3     of the 3 best by their mean over all search samples, how many went through to the end
    entrants        share of the adapters that race
    correlation     of foretold and true losses; NaN where too little is known for a prediction
"""

import json
from typing import Annotated, Any

import numpy as np
import typer

from pipeline.search.past_targets import AUDITED, MIN_SAMPLES, probe
from pipeline.search.prediction import components
from pipeline.search.race import FIRST_RUNG, Floats, Race, finalists, make_schedule

N_SEARCH, N_HOLDOUT, TOKENS = 96, 32, 10
SKILLS = 8
PAST = (0, 4, 8, 12)


def main(
    adapters: Annotated[int, typer.Option(help="In the pool.")] = 1024,
    targets: Annotated[int, typer.Option(help="New targets.")] = 8,
    own: Annotated[float, typer.Option(help="Share of the variance that is of adapter and target together.")] = 0.1,
) -> None:
    """Search made targets with and without a past."""
    worlds = [sampled_targets(seed, adapters, max(PAST) + 1, own) for seed in range(targets)]
    for past in PAST:
        found = [searched(world[:past], world[-1], seed) for seed, world in enumerate(worlds)]
        means = {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}
        print(json.dumps({"past_targets": past, "adapters": adapters, "own": own, **means}), flush=True)


def sampled_targets(seed: int, adapters: int, targets: int, own: float) -> list[Floats]:
    """Losses of adapters (the first: the base) on the samples of each target, in nats, shape (N + 1, S)."""
    generator = np.random.default_rng(seed)
    skills = generator.standard_normal((adapters, SKILLS)) - 0.3
    harm = generator.gamma(2.0, 0.4, adapters)
    return [_sampled(generator, skills, harm, own) for _ in range(targets)]


def _sampled(generator: np.random.Generator, skills: Any, harm: Any, own: float) -> Floats:
    wanted = generator.dirichlet(np.full(SKILLS, 0.3))
    shared = harm - 0.6 * skills @ wanted
    alone = generator.standard_normal(len(skills)) * shared.std()
    effect = np.sqrt(1 - own) * shared + np.sqrt(own) * alone
    samples = N_SEARCH + N_HOLDOUT
    difficulty, asks = generator.gamma(3.0, 0.6, samples), generator.gamma(2.0, 0.5, samples)
    noise = 0.4 * generator.standard_normal((len(skills), samples))
    losses = np.vstack([difficulty, np.maximum(difficulty + effect[:, None] * asks + noise, 0.01)])
    return (losses * TOKENS).astype(np.float32)


def searched(past: list[Floats], new: Floats, seed: int) -> dict[str, float]:
    """One search, and what became of the best."""
    racing, correlation = np.arange(1, len(new)), np.nan
    if len(past) * FIRST_RUNG >= MIN_SAMPLES:
        racing, correlation = _entrants(past, new, seed)
    seen, samples = _raced(new[np.concatenate([[0], racing])])
    best = np.argsort(new[1:, :N_SEARCH].sum(axis=1))[:3] + 1
    through = {int(row) for row, end in zip(racing, seen[1:], strict=True) if end == new.shape[1]}
    return {
        "cost_share": samples / new[1:].size,
        "recall_at_3": float(np.mean([int(one) in through for one in best])),
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
    audited = np.random.default_rng(seed).permutation(unlikely)[: round(AUDITED * len(unlikely))]
    truth, told = new[1:, :N_SEARCH].mean(axis=1), np.isfinite(foretold)
    return np.sort(np.append(probes, audited)) + 1, float(np.corrcoef(foretold[told], truth[told])[0, 1])


def _raced(nll: Floats) -> tuple[Any, int]:
    """Samples that each candidate saw in a race within a tenth, and how many were scored."""
    race = Race(make_schedule(len(nll), N_SEARCH, N_HOLDOUT, 0.1), [TOKENS] * nll.shape[1], np.full_like(nll, np.nan))
    scored = 0
    while not race.over:
        candidates, samples = race.take(16)
        for candidate in candidates:
            race.report(candidate, samples, nll[candidate, samples].tolist())
            scored += len(samples)
    return race.seen_N(), scored


if __name__ == "__main__":
    typer.run(main)
