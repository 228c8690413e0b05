"""What the layers of models are called: by torch.compile and data parallelism, by other versions of transformers, and in models
that also see or hear."""

import re

EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embed_in")
"""What models call the layer that turns tokens into features."""

HEADS = ("lm_head", "embed_out")

LANGUAGE = {"model", "language_model", "text_model", "transformer", "llm"}
"""Parts of the path to a language model's layers."""

LAYERS = re.compile(r"(?<![^.])(layers|h|blocks)\.\d")
"""Where the path of a module comes to the numbered layers."""

WRAPPERS = re.compile(r"(?<![^.])_orig_mod\.|^module\.|(?<=^base_model\.model\.)module\.")
"""What torch.compile and data parallelism put into the names of tensors."""

OTHER_SENSES = re.compile(r"vision|visual|image|audio|multi_?modal")
"""In the path of a layer for pictures or sounds, or of one that leads from these to the language model."""


def is_of_text(module: str) -> bool:
    """Whether text runs through a layer, by its path: layers for pictures and sounds are other ones, however alike."""
    return not OTHER_SENSES.search(module)


def unwrapped(name: str) -> str:
    return WRAPPERS.sub("", name)


def own_name(name: str) -> str:
    """The name of a tensor or layer without what leads to the language model, which is another path in each class of model and
    in each version of transformers: language_model.model.layers.0 and model.language_model.layers.0 -> layers.0."""
    parts = unwrapped(name).split(".")
    first = next((place for place, part in enumerate(parts) if part not in LANGUAGE), len(parts))
    return ".".join(parts[first:])
