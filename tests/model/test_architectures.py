"""Losses under every causal architecture of transformers that can be built tiny, against the model's own logits."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from sizes import SMALL
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pipeline.model.completion_loss import collate, completion_nll, decoder_of, score_rows

SIZES: dict[str, Any] = SMALL | {
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "n_ctx": 128,
    "n_inner": 48,
    "d_model": 32,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of what a config may call the sizes of a model; each takes those that it has."""

OWN_SIZES: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "final_logit_softcapping": 3.0,
    },
    "gemma2": {"final_logit_softcapping": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.3},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
}
"""Of architectures that scale or cap their logits, so that it shows."""

SLOW = {"blt", "phi4_multimodal"}
"""To build takes them minutes."""

MOST_WEIGHTS = 30_000_000
"""Of what is built: some have parts for pictures or sounds that these sizes do not reach."""

NOT_CAUSAL = {"cpmant", "bert-generation"}
"""Let tokens of a row see what comes behind them."""

LEAST_BUILT = 90
"""Architectures that must have been built: else the sweep says little."""

FEW = ["llama", "gemma4_text", "hyperclovax", "recurrent_gemma", "llama4_text", "qwen3_moe", "mamba", "gpt2", "opt"]
"""In the default suite."""

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - SLOW - NOT_CAUSAL)

IDS, MASKS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 3]], [[False] * 3 + [True] * 3, [False, False, True, True]]


def build(name: str) -> Any:
    """A random tiny model; raises whatever a config that does not like these sizes raises."""
    whole = AutoConfig.for_model(name)
    text = whole.get_text_config()
    sizes = {key: value for key, value in SIZES.items() if key in text.attribute_map or _has(text, key)}
    sizes |= OWN_SIZES.get(name, {})
    part = next((key for key, value in vars(whole).items() if value is text), None)
    config = AutoConfig.for_model(name, **({part: sizes} if part else sizes))
    with torch.device("meta"):
        count = sum(weights.numel() for weights in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_WEIGHTS:
        raise ValueError(f"{count} weights")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:
        return True


def own_losses(model: Any) -> list[float]:
    """Of the rows, each alone, by the model's own logits."""
    return [float(own_nll(model, ids, mask)) for ids, mask in zip(IDS, MASKS, strict=True)]


def own_nll(model: Any, ids: Sequence[int], mask: Sequence[bool]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    counted = torch.tensor(mask[1:])
    return cross_entropy(logits[counted], torch.tensor(ids[1:])[counted], reduction="sum")


def check(model: Any) -> None:
    batch = collate(IDS, MASKS, torch.device("cpu"))
    with torch.no_grad():
        expected = own_losses(model)
    assert score_rows(model, batch)[0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    completion_nll(model, batch).sum().backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    sum(own_nll(model, ids, mask) for ids, mask in zip(IDS, MASKS, strict=True)).backward()  # type: ignore[union-attr]
    theirs = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-2, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("name", FEW)
def test_losses_and_gradients_are_the_models_own(name: str) -> None:
    model = build(name)
    assert decoder_of(model) is not None
    check(model)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_losses_of_every_causal_architecture_are_the_models_own() -> None:
    left_out, in_two, wrong = dict[str, str](), list[str](), dict[str, str]()
    for name in NAMES:
        try:
            model = build(name)
            with torch.no_grad():
                own_losses(model)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {str(error)[:100]}"
            continue
        if decoder_of(model) is not None:
            in_two.append(name)
        try:
            check(model)
        except AssertionError as error:
            wrong[name] = str(error)[:200]
    print(f"{len(NAMES) - len(left_out)} built, {len(in_two)} run in two steps; not built: {left_out}")
    assert not wrong
    assert len(NAMES) - len(left_out) >= LEAST_BUILT, left_out
    assert len(in_two) >= LEAST_BUILT


def test_a_model_that_cannot_be_run_in_two_steps_is_used_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    plain = type(model).forward

    def forward(self: Any, input_ids: torch.Tensor, **settings: Any) -> Any:
        """Logits that depend on more than the last hidden states."""
        output = plain(self, input_ids=input_ids, **settings)
        output.logits = output.logits + self.model.embed_tokens(input_ids).mean(dim=-1, keepdim=True) * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    assert decoder_of(model) is None
    check(model)
