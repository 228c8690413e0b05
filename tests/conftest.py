"""Tiny models, adapters and one Ray cluster, all built here: no test reaches a network host."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Before torch is imported. Threads of several test processes that spin while they wait take the CPUs from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from store_server import StoreServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.config import Config, TrainConfig, build_config
from pipeline.core import storage, uploads, whole_files
from pipeline.core.storage import Folder
from pipeline.core.tables import SAMPLES, TEST
from pipeline.data.tokenise import Reading, tokenise
from pipeline.train.arm import Arm, Job, Lora
from pipeline.train.loop import Finetuning

SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "What is the capital of France? The capital of France is Paris.",
    "Add the numbers: 12 + 30 = 42, and 7 times 6 is 42 as well.",
    "user assistant system: answer the question in one short sentence.",
    "Is this review positive or negative? The hotel was clean and quiet.",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VOCABULARY = 400

LOGGED = 4_000
"""Characters at the end of each worker's log that a failed test shows."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the cluster runs in one of the test processes, which starts it once; its workers import torch once, too. Whole
    runs begin first: of two test processes, neither ends long after the other."""

    def needs_cluster(item: pytest.Item) -> bool:
        return "ray_session" in getattr(item, "fixturenames", ())

    def length(item: pytest.Item) -> tuple[float, bool]:
        limit = item.get_closest_marker("timeout")
        return limit.args[0] if limit else 0, needs_cluster(item)

    items.sort(key=length, reverse=True)
    for item in filter(needs_cluster, items):
        item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What Ray's workers logged during a test that failed is shown with it."""
    report = yield
    if report.failed and "ray_session" in getattr(item, "funcargs", ()):
        logged = [file.read_text(errors="replace") for file in _log_files() if file.stat().st_mtime >= call.start]
        report.sections.append(("Ray's workers", "\n".join(text[-LOGGED:] for text in logged)))
    return report


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 2 layers with seeded weights and a ChatML tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    _tokenizer().save_pretrained(folder)
    _seeded_model(tie_word_embeddings=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def untied_base(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, with an output head of its own and without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "untied-base"
    tokenizer = _tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    _seeded_model(tie_word_embeddings=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def seeing_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Gemma 3 with an encoder for pictures, whose files have names of transformers before 4.52."""
    folder = tmp_path_factory.mktemp("models") / "seeing-base"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16} | sizes
    vision = {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"} | sizes
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """make_adapter(folder, base, *, rank, alpha, targets, seed, std, whole, **LoraConfig fields): an adapter as PEFT writes it;
    layers that it saves whole change by normal numbers of standard deviation `whole`."""

    def make(
        folder: Path,
        base: str,
        *,
        rank: int = 4,
        alpha: float = 8,
        targets: Iterable[str] | str = ("q_proj", "v_proj"),
        seed: int = 0,
        std: float = 0.05,
        whole: float = 0.0,
        **overrides: Any,
    ) -> Path:
        torch.manual_seed(seed)
        chosen = targets if isinstance(targets, str) else list(targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM", **overrides)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    weight.normal_(std=std)
                elif whole and weight.requires_grad and "lora_" not in name:
                    weight.add_(torch.randn_like(weight), alpha=whole)
        model.save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[dict[str, Any]]], str]:
    """write_jsonl(path, rows): one JSON object a line; gives the path back as text."""

    def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def random_samples() -> Callable[..., pa.Table]:
    """random_samples(lengths, n_search, seed): rows of random tokens, the second half of each the completion and one token
    behind it that is learned too; those after the first `n_search` are held out."""

    def draw(lengths: Sequence[int], n_search: int | None = None, seed: int = 0) -> pa.Table:
        generator = torch.Generator().manual_seed(seed)
        rows = [
            {
                "sample_id": f"s{number}",
                "split": "search" if n_search is None or number < n_search else "holdout",
                "input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(),
                "completion_mask": [length // 2 <= place < length - 1 for place in range(length)],
                "learn_mask": [length // 2 <= place for place in range(length)],
            }
            for number, length in enumerate(lengths)
        ]
        return pa.Table.from_pylist(rows, schema=SAMPLES)

    return draw


@pytest.fixture(scope="session")
def data(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Splits of a task that a few steps can learn: repeat the last word."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    words = ["fox", "dog", "river", "hotel", "review", "France", "Paris", "number"]
    rows = [{"prompt": f"{a} and {b}", "completion": b, "choices": words} for a in words for b in words]
    folder = Folder.at(tmp_path_factory.mktemp("data"))
    for split, part in {"train": rows[8:], "validation": rows[:8], "test": rows[:4]}.items():
        schema, reading = (TEST, Reading(choices=True)) if split == "test" else (SAMPLES, Reading())
        tokens = [{"sample_id": str(n), "split": split, **tokenise(row, tokenizer, reading)} for n, row in enumerate(part)]
        folder.write_table(f"{split}.parquet", pa.Table.from_pylist(tokens, schema=schema))
    return folder


@pytest.fixture
def config_for(tiny_base: str) -> Callable[..., Config]:
    def config(train: str | Path, base: str = tiny_base, samples: int = 8, seed: int = 0, **target: Any) -> Config:
        content = {"run": "r", "base": base, "pool": "p", "target": {"train": str(train), **target}}
        return build_config({**content, "search": {"samples": samples, "seed": seed}}, "test")

    return config


@pytest.fixture
def job(tiny_base: str, data: Folder) -> Callable[..., Job]:
    def make(key: str = "k", **train: Any) -> Job:
        settings = {"steps": 8, "batch_size": 8, "evaluations": 4, "dtype": "float32", "cpus_per_worker": 1, **train}
        lora = Lora(4, 8.0, ("q_proj", "v_proj", "down_proj"))
        return Job(Arm("base", 1e-2, 0), tiny_base, lora, TrainConfig(**settings), data, data, key)

    return make


@pytest.fixture(scope="session")
def without_time() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """without_time(curve): what two runs of the same arm have in common, rounded."""

    def strip(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: round(v, 4) for key, v in row.items() if key not in ("seconds", "init") and v == v} for row in curve]

    return strip


@pytest.fixture(scope="session")
def word_rows() -> list[dict[str, Any]]:
    """A hundred rows of a task that a few steps can learn: repeat the last word."""
    words = ["fox", "dog", "river", "hotel", "review", "France", "Paris", "number", "brown", "lazy"]
    return [{"prompt": f"{a} and {b}", "completion": b} for a in words for b in words]


@pytest.fixture(scope="session")
def train_donor(
    tiny_base: str, word_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, int], None]:
    """train_donor(folder, seed): an adapter of the tiny base that was trained on `word_rows`, ten steps times the seed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokens = [{"sample_id": str(n), "split": "train", **tokenise(row, tokenizer)} for n, row in enumerate(word_rows)]

    def train(target: Path, seed: int) -> None:
        data = Folder.at(tmp_path_factory.mktemp("donor"))
        for split in ("train", "validation"):
            data.write_table(f"{split}.parquet", pa.Table.from_pylist(tokens, schema=SAMPLES))
        settings = TrainConfig(steps=10 * seed, batch_size=16, evaluations=1, dtype="float32")
        lora = Lora(4 * seed, 8.0, ("q_proj", "v_proj", "up_proj"))

        training = Finetuning(Job(Arm("base", 1e-2, seed), tiny_base, lora, settings, data, data, "donor"), 0, 1, lambda *_: None)
        training.run()
        saved = tmp_path_factory.mktemp("saved")
        training.trainable.save(saved, training.trainable.trained(rank=0))
        target.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (target / name).write_bytes((saved / name).read_bytes())

    return train


@pytest.fixture(scope="session")
def write_pool(tiny_base: str, make_adapter: Callable[..., Path], train_donor: Callable[..., None]) -> Callable[[Path], Path]:
    """write_pool(folder): two donors that were trained on `word_rows`, two that were not. Gives the folder back."""

    def write(folder: Path) -> Path:
        for seed in (1, 2):
            train_donor(folder / f"related/{seed}", seed)
            make_adapter(folder / f"random/{seed}", tiny_base, rank=2, alpha=4, seed=seed, std=0.1)
        return folder

    return write


@pytest.fixture(scope="session")
def small_config(tiny_base: str, write_jsonl: Any, word_rows: list[dict[str, Any]]) -> Callable[[Path, Path], dict[str, Any]]:
    """small_config(pool, folder): a whole run on the tiny base, its data in the folder; `run` is for the test to add."""

    def config(pool: Path, folder: Path) -> dict[str, Any]:
        return {
            "base": tiny_base,
            "pool": str(pool),
            "target": {"train": write_jsonl(folder / "train.jsonl", word_rows)},
            "search": {"samples": 24, "engine": "transformers", "adapters_per_batch": 1, "cpus_per_actor": 1, "actors": 1},
            "train": {"steps": 6, "batch_size": 8, "learning_rates": [5e-3], "evaluations": 3, "cpus_per_worker": 1},
        }

    return config


@pytest.fixture(scope="session")
def store_server() -> Iterator[StoreServer]:
    server = StoreServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def object_store(store_server: StoreServer) -> Iterator[str]:
    """A local S3 server that the usual AWS variables point to; gives its endpoint."""
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": store_server.endpoint}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield store_server.endpoint


@pytest.fixture
def bucket(object_store: str, request: pytest.FixtureRequest) -> str:
    """The URI of a fresh bucket."""
    from pipeline.core.storage import Folder

    uri = f"s3://bucket-{abs(hash(request.node.nodeid))}"
    Folder.at(f"{uri}?allow_bucket_creation=true").create()
    return uri


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Asks an object store that fails a second time at most, in this process, in place of for minutes."""
    monkeypatch.setattr(uploads, "RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=1)})
    monkeypatch.setattr(whole_files, "READ_ATTEMPTS", 2)
    monkeypatch.setattr(whole_files, "_SHARED", {})
    monkeypatch.setattr(storage, "_BUCKETS", {})
    uploads._s3.cache_clear()
    yield
    uploads._s3.cache_clear()


@pytest.fixture(scope="session")
def ray_session(object_store: str) -> Iterator[None]:
    """One local Ray cluster for all tests that need one; its workers inherit the way to the object store."""
    import ray

    from pipeline.cluster.connect import set_data_context, start

    start(num_cpus=4, include_dashboard=False)
    set_data_context()
    yield
    ray.shutdown()


@pytest.fixture
def worker_logs(ray_session: None) -> Callable[[], str]:
    """worker_logs(): all that the session's workers have logged so far."""
    return lambda: "".join(file.read_text() for file in _log_files())


def _log_files() -> list[Path]:
    import ray

    return sorted(Path(ray._private.worker._global_node.get_logs_dir_path()).glob("worker-*.err"))


def _seeded_model(tie_word_embeddings: bool) -> LlamaForCausalLM:
    """Weights large enough that the logits are not flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast
