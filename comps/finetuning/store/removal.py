"""Takes directories away together with the rows that name them: both go, or neither.

While the transaction that deletes the rows is open, a directory is put aside with a rename, so that nobody
finds it half-removed. It comes back when the transaction fails; its files are removed after the commit. What
a crash leaves aside has a note of where it was, and :func:`settle` asks the rows which of the two it must be.

::

    <area>/.deleted-<random>/from      where the directory was, relative to <area>
    <area>/.deleted-<random>/content   the directory

An area is a directory of the data directory, such as ``jobs``.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from comps.tuning.rundir import fsync_path

log = logging.getLogger(__name__)

_ASIDE = ".deleted-"
_FROM, _CONTENT = "from", "content"


class Removal:
    """The directories that one transaction takes away; see :func:`removal`."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._taken: list[tuple[Path, Path]] = []

    def take(self, directory: Path) -> None:
        """Put a directory below an area aside. One that is not there is gone already."""
        if not directory.exists():
            return
        area = self._data_dir / directory.relative_to(self._data_dir).parts[0]
        aside = area / f"{_ASIDE}{uuid.uuid4().hex}"
        aside.mkdir(mode=0o700)
        (aside / _FROM).write_text(str(directory.relative_to(area)), encoding="utf-8")
        for path in (aside / _FROM, aside):  # so that the note is there whenever the directory is
            fsync_path(path)
        self._taken.append((aside, directory))
        directory.rename(aside / _CONTENT)
        for path in (aside, area, directory.parent):
            fsync_path(path)

    def undo(self) -> None:
        for aside, directory in reversed(self._taken):
            if (aside / _CONTENT).exists():
                (aside / _CONTENT).rename(directory)
            shutil.rmtree(aside)

    def finish(self) -> None:
        for aside, directory in self._taken:
            try:
                shutil.rmtree(aside)
            except OSError as error:
                # The rows are gone, so it is deleted; what is left of the files goes at the next start.
                log.warning("what was deleted of %s could not all be removed yet: %s", directory, error)


@contextmanager
def removal(data_dir: Path) -> Iterator[Removal]:
    """Enter before the transaction, so that it is committed before any file is removed::

    with removal(data_dir) as taken, database.session() as session: ...
    """
    taken = Removal(data_dir)
    try:
        yield taken
    except BaseException:
        taken.undo()
        raise
    taken.finish()


def settle(area: Path, is_known: Callable[[Path], bool]) -> None:
    """Bring what a crash left aside to its end: a directory that rows still name goes back to its place.

    For the start, before any request.
    """
    for aside in area.glob(f"{_ASIDE}*"):
        note, content = aside / _FROM, aside / _CONTENT
        if note.exists() and content.exists():
            directory = area / note.read_text(encoding="utf-8")
            if is_known(directory):
                log.warning("the deletion of %s was interrupted before it was decided; it is back", directory)
                content.rename(directory)
        shutil.rmtree(aside)
