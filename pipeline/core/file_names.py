"""The files of an adapter, and of a full checkpoint, as PEFT and transformers name them; and what names of data end in."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FILES = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
"""That are read of an adapter."""

INDEX_FILE = "model.safetensors.index.json"
"""Of a full checkpoint in several files of weights."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Ends of names; such files are never opened."""

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
GZIP_SUFFIX = ".gz"
"""May follow the suffix of a text file."""
