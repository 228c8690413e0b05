"""Changes of an adapter on disk."""

import json
from pathlib import Path
from typing import Any

from pipeline.core.file_names import CONFIG_FILE


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of an adapter's config; gives the folder back."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder
