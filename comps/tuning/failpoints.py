"""Places at which a test may have the process die, or the disk be full, at exactly that moment.

Off unless ``COMPS_FAILPOINTS`` names a directory, which no setting of the service does. There a file with the
name of a fail point arms it: ``kill``, ``hold`` or ``full`` as its content. It goes off once, in whichever
process comes by first, and the file is gone then; so a test sees what has gone off, and a restart does not
repeat it.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

VARIABLE = "COMPS_FAILPOINTS"


def failpoint(name: str) -> None:
    """Do nothing, or what a test has armed ``name`` to do: die, stand still, or raise ENOSPC."""
    if not (directory := os.environ.get(VARIABLE)):
        return
    armed = Path(directory) / name
    try:
        action = armed.read_text()
        armed.unlink()
    except FileNotFoundError:
        return
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.SIGSTOP if action == "hold" else signal.SIGKILL)
