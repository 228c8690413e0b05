"""What a run leaves behind, for tests of what is drawn from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.storage import Folder


@dataclass
class RunData:
    """The documents and tables of a run, to be changed at will and written."""

    documents: dict[str, Any]
    tables: dict[str, pa.Table]

    def write(self, path: Path) -> Folder:
        folder = Folder.at(path)
        for name, value in self.documents.items():
            folder.write_json(name, value)  # config.yaml too: JSON is YAML
        for name, table in self.tables.items():
            folder.write_table(name, table)
        return folder
