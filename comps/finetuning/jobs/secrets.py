"""Hugging Face tokens that requests carry: encrypted in the job's row until the job has ended.

They never reach a spec, a log, an event or an error. ``comps.tuning.sealed`` tells how they reach the run.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from comps.finetuning.store.tables import JobRow
from comps.tuning import sealed


class Secrets:
    """Tokens sealed with the key in ``key_file``, which is made when it is first needed."""

    def __init__(self, key_file: Path, fallback: SecretStr | None = None) -> None:
        self._key_file, self._fallback = key_file, fallback

    def seal(self, token: SecretStr) -> str:
        """What may be stored."""
        sealed.make_key(self._key_file)
        return sealed.seal(token.get_secret_value(), self._key_file)

    def token(self, job: JobRow) -> str | None:
        """The job's own token, or the operator's. Raises :class:`comps.tuning.errors.TuningError`."""
        if job.secret is not None:
            return sealed.unseal(job.secret, self._key_file)
        return self._fallback.get_secret_value() if self._fallback else None

    def environment(self, job: JobRow) -> dict[str, str]:
        """The variables by which the job's run gets its token."""
        secret = job.secret or (self.seal(self._fallback) if self._fallback else None)
        if secret is None:
            return {}
        return {sealed.SEALED: secret, sealed.KEY_FILE: str(self._key_file)}
