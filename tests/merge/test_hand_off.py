"""A mashup in other people's trainers: what docs/hand-off.md says is done."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from pipeline.adapters.adapter import read_adapter, write_adapter
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE


@pytest.mark.long
def test_trl_goes_on_from_a_mashup(tmp_path: Path, tiny_base: str, make_adapter: Callable[..., Path]) -> None:
    mashup = tmp_path / "mashup"
    write_adapter(mashup, read_adapter(make_adapter(tmp_path / "donor", tiny_base)))  # as the merge writes it
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(mashup), is_trainable=True)
    rows = Dataset.from_list([{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(8)])
    asked = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
    )
    trainer = SFTTrainer(model=model, args=asked, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(tiny_base))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    stored = load_file(mashup / WEIGHTS_FILE)
    assert {name.replace(".default", "") for name in before} == stored.keys()
    assert all(torch.equal(weight, stored[name.replace(".default", "")]) for name, weight in before.items())
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    trainer.model.save_pretrained(str(tmp_path / "after"))
    kept = ("r", "lora_alpha", "target_modules")
    configs = [json.loads((folder / CONFIG_FILE).read_text()) for folder in (mashup, tmp_path / "after")]
    assert all(sorted(a) == sorted(b) if isinstance(a, list) else a == b for a, b in ([c[k] for c in configs] for k in kept))
    after = load_file(tmp_path / "after" / WEIGHTS_FILE)
    assert any(not torch.equal(after[name], stored[name]) for name in stored)
