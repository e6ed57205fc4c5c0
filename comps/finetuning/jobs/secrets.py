"""Hugging Face tokens that requests carry: held in memory only, for as long as the job needs them.

They never reach the database, a spec, a log or an error. After a restart of the service a resumed job
falls back to the operator's ``HF_TOKEN``.
"""

from __future__ import annotations

from pydantic import SecretStr


class Secrets:
    """One token a job at most. Only touched from the event loop's thread and short route handlers."""

    def __init__(self, fallback: SecretStr | None = None) -> None:
        self._fallback = fallback
        self._tokens: dict[str, SecretStr] = {}

    def keep(self, job_id: str, token: SecretStr) -> None:
        self._tokens[job_id] = token

    def token(self, job_id: str) -> str | None:
        """The job's own token, or the operator's."""
        secret = self._tokens.get(job_id, self._fallback)
        return secret.get_secret_value() if secret else None

    def forget(self, job_id: str) -> None:
        self._tokens.pop(job_id, None)
