"""Whether what an engine scores is what was indexed."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.adapters.adapter import CHANGED, require_hash
from pipeline.core.file_names import CONFIG_FILE, WEIGHTS_FILE
from pipeline.engines.scorer import Candidate

FileStates = tuple[tuple[int, int], ...]
"""Size in bytes and time in nanoseconds."""


class IndexedAdapters:
    """Sees to it that what is scored is what was indexed: else it would have its scores under another adapter's key, for ever.
    Sizes and times of files say whether it is still what was looked at."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[str, FileStates]] = {}

    def require(self, candidate: Candidate, expected: str, known_state: str | None = None, state: str | None = None) -> None:
        """
        Args:
            known_state: of the adapter's files when it was indexed, as of `pool.files_state`.
            state: the same now. Where the two are equal, nothing is read.

        Raises:
            AdapterError: the adapter is another one by now, or gone.
        """
        assert candidate.folder is not None
        seen = _states(candidate.folder)
        if self._states.get(candidate.adapter_id) != (expected, seen):
            if known_state is None or known_state != state:
                require_hash(candidate.folder, expected)
            self._states[candidate.adapter_id] = expected, seen

    def changed(self, candidates: Sequence[Candidate]) -> dict[str, str]:
        """Those that changed while they were scored, with the reason."""
        folders = {candidate.adapter_id: candidate.folder for candidate in candidates if candidate.folder}
        return {name: CHANGED for name, folder in folders.items() if _states(folder) != self._states[name][1]}


def _states(folder: Path) -> FileStates:
    """Of an adapter's files; of those that are there."""
    found = list[tuple[int, int]]()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with suppress(FileNotFoundError):
            file = (folder / name).stat()
            found.append((file.st_size, file.st_mtime_ns))
    return tuple(found)
