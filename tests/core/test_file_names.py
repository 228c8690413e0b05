"""The names are those of the libraries that write such files; they are not imported, as it takes seconds."""

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from pipeline.core.file_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE


def test_files_are_called_as_peft_and_transformers_call_them() -> None:
    assert (CONFIG_FILE, WEIGHTS_FILE) == (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    assert INDEX_FILE == SAFE_WEIGHTS_INDEX_NAME
