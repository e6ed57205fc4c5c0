"""Fixtures for tests that talk to a running service; see ``service_process``."""

from __future__ import annotations

import os

# Tiny tensors gain nothing from a second thread, and lose much when the cores are busy. Set before torch
# is imported; services that are started get their own setting.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import openai
import pytest
from service_process import ServiceProcess

MakeServer = Callable[..., ServiceProcess]
_running: list[ServiceProcess] = []


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One service without Ray, shared by the tests that neither stop it nor count what others made."""
    with closing(ServiceProcess(tmp_path_factory.mktemp("service"))) as service:
        _running.append(service)
        yield service
        _running.remove(service)


@pytest.fixture
def client(server: ServiceProcess) -> openai.OpenAI:
    """The official client, speaking to the shared service."""
    return server.openai


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """Starts services for one test: ``make_server(ray=False, FINETUNING_...="...")``."""
    started: list[ServiceProcess] = []
    with ExitStack() as stack:

        def make(*, ray: bool = False, **environment: str) -> ServiceProcess:
            service = ServiceProcess(tmp_path / f"service-{len(started)}", ray=ray, **environment)
            started.append(stack.enter_context(closing(service)))
            _running.append(service)
            return service

        yield make
        for service in started:
            _running.remove(service)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    """A failed test shows what its services logged."""
    report = yield
    if report.failed:
        for service in _running:
            report.sections.append((f"log of {service.url}", service.log[-8000:]))
    return report
