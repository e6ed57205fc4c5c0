"""A secret on its way into a run: encrypted wherever it lies or can be seen, opened by the run alone.

What is submitted to Ray with a job (its environment) appears in Ray's tables, in its dashboard and, for a
moment, on a command line. So the service passes the Hugging Face token sealed, beside the path of the key,
which is a file of mode 0600 in the data directory; each process of the run opens it for itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from comps.tuning.errors import TuningError
from comps.tuning.rundir import create_file

TOKEN = "HF_TOKEN"
SEALED = "COMPS_SEALED_HF_TOKEN"
KEY_FILE = "COMPS_KEY_FILE"


def make_key(path: Path) -> None:
    """Write a new key (Fernet: AES-128-CBC with HMAC-SHA-256) to ``path``, for its owner alone.

    A key that is there already stays.
    """
    from cryptography.fernet import Fernet

    if not path.exists():
        create_file(path, Fernet.generate_key(), 0o600)


def seal(secret: str, key_file: Path) -> str:
    """``secret``, encrypted with the key in ``key_file``: ASCII text."""
    from cryptography.fernet import Fernet

    return Fernet(key_file.read_bytes()).encrypt(secret.encode()).decode("ascii")


def unseal(sealed: str, key_file: Path) -> str:
    """The secret again. Raises :class:`TuningError` when the key is gone or is another one."""
    from cryptography.fernet import Fernet, InvalidToken

    try:
        return Fernet(key_file.read_bytes()).decrypt(sealed).decode()
    except (OSError, ValueError, InvalidToken) as error:
        reason = error.strerror if isinstance(error, OSError) else "it was made with another key"
        raise TuningError(
            f"the job's Hugging Face token cannot be opened with {key_file.name} ({reason}); "
            "create the job again",
            param="General.config.token",
        ) from error


def unseal_environment() -> None:
    """Put the run's token, if it has one, where the Hugging Face libraries look for it."""
    if sealed := os.environ.pop(SEALED, None):
        os.environ[TOKEN] = unseal(sealed, Path(os.environ[KEY_FILE]))
