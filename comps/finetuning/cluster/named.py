"""The cluster that the operator names with ``RAY_ADDRESS``: where its dashboard is, and its token."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from comps.finetuning.cluster.errors import ClusterUnavailable
from comps.finetuning.cluster.local_head import ON_LOOPBACK

_TIMEOUT = 60.0
# Ray's own client asks the cluster (by RAY_ADDRESS) for its dashboard, and the dashboard for its version.
_ASK = "from ray.job_submission import JobSubmissionClient as C; print(C().get_address())"


def operator_token() -> str:
    """The cluster's token, from where Ray itself looks for it; empty when there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return path.read_text().strip() if path.is_file() else ""


async def dashboard_address(named: str) -> str:
    """The dashboard of the cluster at ``named``: that very address when it is an ``http`` one; otherwise
    (``auto``, ``host:6379``, ``ray://host:10001``) Ray is asked, in a process of its own.

    Raises :class:`ClusterUnavailable`.
    """
    if named.startswith(("http://", "https://")):
        return named
    environment = {**os.environ, "RAY_ADDRESS": named}
    if named.startswith(("127.", "localhost:")):
        environment |= ON_LOOPBACK
    if operator_token():
        environment.setdefault("RAY_AUTH_MODE", "token")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _ASK, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = await asyncio.wait_for(process.communicate(), _TIMEOUT)
    except TimeoutError as error:
        raise ClusterUnavailable(f"the Ray cluster at RAY_ADDRESS={named} does not answer") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    address = output.decode().strip().rpartition("\n")[2]
    if process.returncode or not address.startswith("http"):
        reason = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise ClusterUnavailable(f"there is no Ray cluster with a dashboard at RAY_ADDRESS={named}: {reason}")
    return address
