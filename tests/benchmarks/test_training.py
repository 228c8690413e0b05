"""Our finetuning beside TRL's and transformers' on the same rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.training import losses, ours, theirs, uneven_rows, write_data
from pipeline.train.arm import Job


@pytest.mark.parametrize("kind", ["trl", "hf_trainer"])
def test_losses_gradients_and_final_weights_are_theirs(kind: str, job: Callable[..., Job], tmp_path: Path) -> None:
    data = write_data(tmp_path, uneven_rows(job().base, 20))
    same = replace(job(steps=6, evaluations=1, batch_size=8, tokens_per_pass=200), data=data)
    mine, other = ours(same), theirs(same, kind)
    assert mine.losses == pytest.approx(losses(other), abs=2e-4)
    trained = [weight for weight in other.model.parameters() if weight.requires_grad]
    for weight, expected in zip(mine.trainable.weights, trained, strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-3)
        for moment in ("exp_avg", "exp_avg_sq"):  # of the gradients, of which Adam's steps show the direction alone
            found, wanted = mine.optimizer.state[weight][moment], other.optimizer.state[expected][moment]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-2)
    assert max(float(weight.detach().abs().max()) for weight in trained[1::2]) > 1e-2  # B starts at zero
