"""Ray's documented REST interface for jobs, spoken directly.

Importing Ray costs a second and a hundred megabytes; the service needs four requests of it. This module is
itself imported late, by :class:`comps.finetuning.cluster.cluster.Cluster`: aiohttp takes a quarter of what
all of the service takes to start.
"""

from __future__ import annotations

from typing import Any, Literal

import aiohttp

from comps.finetuning.cluster.errors import ClusterUnavailable, NodesLost

# Ray's own words, and one for what it calls FAILED because there was no room for it in time.
RayStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED", "NO ROOM"]


class JobsClient:
    """One Ray dashboard. ``address`` is ``http://host:port``; ``token`` is Ray's auth token, or empty."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=30))

    async def close(self) -> None:
        await self._session.close()

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The status and JSON object of one request; an empty object when there is no JSON."""
        try:
            async with self._session.request(method, self.address + path, json=body) as response:
                if response.status == 401:
                    raise ClusterUnavailable(
                        f"Ray at {self.address} refuses the token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
                        "to the cluster's token"
                    )
                if response.content_type != "application/json":
                    return response.status, {"text": await response.text()}
                value = await response.json()
                return response.status, value if isinstance(value, dict) else {"items": value}
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise ClusterUnavailable(f"Ray at {self.address} does not answer ({reason})") from error

    async def nodes(self) -> list[dict[str, float]]:
        """The total resources (``{"CPU": 8.0, ...}``) of each living node; at least one, since a cluster
        whose nodes have not registered yet cannot run anything and counts as unavailable."""
        status, value = await self._request("GET", "/api/v0/nodes?limit=10000")
        try:
            nodes = value["data"]["result"]["result"]
        except (KeyError, TypeError) as error:
            raise ClusterUnavailable(f"Ray at {self.address} cannot list its nodes ({status})") from error
        if living := [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]:
            return living
        if nodes:
            raise NodesLost(f"Ray at {self.address} has lost all its nodes")
        raise ClusterUnavailable(f"Ray at {self.address} has no nodes yet")

    async def submit(
        self, submission_id: str, entrypoint: str, env: dict[str, str], job_id: str, cores: int, gpus: float
    ) -> None:
        """Start ``entrypoint`` under ``submission_id``, on a node that has ``cores`` and ``gpus`` to give.

        Submitting the same id twice changes nothing.
        """
        body = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": env},
            "metadata": {"job_id": job_id},
            "entrypoint_num_cpus": cores,
            "entrypoint_num_gpus": gpus,
        }
        status, value = await self._request("POST", "/api/jobs/", body)
        if status != 200 and await self.status(submission_id) is None:
            raise ClusterUnavailable(f"Ray refused the job ({status}): {value.get('text', value)}")

    async def status(self, submission_id: str) -> RayStatus | None:
        """What Ray knows of a submission; ``None`` when it does not know it."""
        status, value = await self._request("GET", f"/api/jobs/{submission_id}")
        if status == 404:
            return None
        if status != 200:
            raise ClusterUnavailable(f"Ray answers {status} for {submission_id}")
        if value["status"] == "FAILED" and value.get("error_type") == "JOB_SUPERVISOR_ACTOR_START_TIMEOUT":
            return "NO ROOM"
        result: RayStatus = value["status"]
        return result

    async def stop(self, submission_id: str) -> None:
        """Ask Ray to end a submission's processes. Unknown and ended ones are fine."""
        await self._request("POST", f"/api/jobs/{submission_id}/stop", {})
