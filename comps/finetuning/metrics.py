"""What the service itself adds to ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from comps.finetuning.jobs.states import Status
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import FileRow, JobRow


class StoreMetrics(Collector):
    """Jobs by status, and stored files. Asked of the database at each scrape, so it cannot drift."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterable[Metric]:
        """Names nothing: registering must not ask a database that is not there yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        with self._database.reading() as session:
            counted = select(JobRow.status, func.count().label("jobs")).group_by(JobRow.status)
            by_status = {row.status: row.jobs for row in session.execute(counted)}
            files, size = session.execute(select(func.count(), func.sum(FileRow.bytes))).one()
        jobs = GaugeMetricFamily("finetuning_jobs", "Jobs by status.", labels=["status"])
        for status in get_args(Status):
            jobs.add_metric([status], by_status.get(status, 0))
        yield jobs
        yield GaugeMetricFamily("finetuning_files", "Stored files.", value=files)
        yield GaugeMetricFamily("finetuning_files_bytes", "Bytes of stored files.", value=size or 0)
