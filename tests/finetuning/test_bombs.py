"""Bodies that are made to hurt: each gets a 4xx, memory stays flat, and health answers meanwhile."""

from __future__ import annotations

import gzip
import io
import json
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import httpx
import psutil
import pytest
from fixtures_models import save_tiny_model
from service_process import ROOT, ServiceProcess

MEGABYTE = 2**20
# What a request may leave behind: the allocator's own, no part of a body.
FLAT = 32 * MEGABYTE
MULTIPART = {"content-type": "multipart/form-data; boundary=b"}
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
MODEL = "org/bombs"


def memory(service: ServiceProcess) -> int:
    """The service's resident memory in bytes."""
    return int(psutil.Process(service.process.pid).memory_info().rss)


@pytest.fixture
def flat(server: ServiceProcess) -> Iterator[None]:
    """The shared service has hardly more memory after a test than before it."""
    server.http.post("/v1/models", json={"id": "a", "path": "no"})  # what the first request loads
    server.http.post("/v1/files", content=b"", headers=MULTIPART)
    before = memory(server)
    yield
    assert memory(server) - before < FLAT


def watched(server: ServiceProcess, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """``blocks``; after every tenth of them the service is asked how it is."""
    for number, block in enumerate(blocks):
        yield block
        if number % 10 == 9:
            assert httpx.get(f"{server.url}/health", timeout=5).is_success


def post(server: ServiceProcess, blocks: Iterator[bytes], path: str = "/v1/files") -> httpx.Response | None:
    """The answer, or ``None`` when the service had hung up before it was given everything."""
    headers = MULTIPART if path == "/v1/files" else {}
    try:
        return server.http.post(path, content=watched(server, blocks), headers=headers)
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return None


def repeated(start: bytes, block: bytes, times: int) -> Iterator[bytes]:
    yield start
    for _ in range(times):
        yield block


PART = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nx\r\n'
UPLOADS: dict[str, Callable[[], Iterator[bytes]]] = {
    "100,000 parts": lambda: repeated(b"", PART * 1000, 100),
    "a field's name of 50 MB": lambda: repeated(
        b'--b\r\nContent-Disposition: form-data; name="', b"x" * MEGABYTE, 50
    ),
    "a header of 50 MB": lambda: repeated(b"--b\r\nX-Header: ", b"x" * MEGABYTE, 50),
    "a header's name of 50 MB": lambda: repeated(b"--b\r\n", b"x" * MEGABYTE, 50),
    "50 MB of headers": lambda: repeated(b"--b\r\n", b"X: y\r\n" * 200_000, 50),
    "a field of 50 MB": lambda: repeated(
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n', b"x" * MEGABYTE, 50
    ),
    "no final boundary": lambda: repeated(FILE, b"x" * MEGABYTE, 50),
    "no boundary at all": lambda: repeated(b"", b"x" * MEGABYTE, 50),
    "nearly a boundary, again and again": lambda: repeated(FILE, b"\r\n--" * 250_000, 20),
    "line ends only": lambda: repeated(b"", b"\r\n" * 500_000, 20),
}


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize("body", UPLOADS.values(), ids=UPLOADS)
def test_an_upload_that_is_a_bomb_is_refused(
    server: ServiceProcess, body: Callable[[], Iterator[bytes]]
) -> None:
    before = set((server.data_dir / "files").iterdir())
    answer = post(server, body())
    if answer is not None:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]
    assert set((server.data_dir / "files").iterdir()) == before


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def wide(field: str, value: Any) -> bytes:
    """Nearly a megabyte of one value in a list."""
    count = 900_000 // (len(json.dumps(value)) + 2)
    return json.dumps({"id": "a", "path": "b", "training_file": "f", field: [value] * count}).encode()


def block(name: str, field: str, value: Any) -> bytes:
    count = 900_000 // (len(json.dumps(value)) + 2)
    body = {"model": "m", "training_file": "f", name: {field: [value] * count}}
    return json.dumps(body).encode()


MANY_KEYS = json.dumps({f"k{n}": n for n in range(70_000)}).encode()
BODIES: dict[str, tuple[str, bytes]] = {
    "deep": ("/v1/models", nested(100_000)),
    "deep within a known field": ("/v1/fine_tuning/jobs", b'{"General":' + nested(100_000) + b"}"),
    "a number of 900,000 digits": ("/v1/models", b'{"id":' + b"9" * 900_000 + b"}"),
    "a float of 900,000 digits": ("/v1/models", b'{"id":1.' + b"9" * 900_000 + b',"path":"x"}'),
    "many numbers": ("/v1/models", b'{"id":[' + b"1e308," * 150_000 + b"1]}"),
    "many keys": ("/v1/models", MANY_KEYS),
    "many keys in a block": ("/v1/fine_tuning/jobs", b'{"General":' + MANY_KEYS + b"}"),
    "many metadata": ("/v1/fine_tuning/jobs", b'{"training_file":"f","metadata":' + MANY_KEYS + b"}"),
    "many wrong metadata": (
        "/v1/fine_tuning/jobs",
        json.dumps({"training_file": "f", "metadata": {f"k{n}": [] for n in range(60_000)}}).encode(),
    ),
    "many escapes": ("/v1/models", b'{"id":"' + b"\\u0041" * 150_000 + b'"}'),
    "many quotes": ("/v1/models", b'"' * 900_000),
    "many commas": ("/v1/models", b'{"a":[' + b"," * 900_000 + b"]}"),
    "many brackets that close": ("/v1/models", b"]" * 900_000),
    "many integrations": ("/v1/fine_tuning/jobs", wide("integrations", {})),
    "many tags": (
        "/v1/fine_tuning/jobs",
        json.dumps(
            {
                "training_file": "f",
                "integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": [7] * 200_000}}],
            }
        ).encode(),
    ),
    "many wrong ranks": ("/v1/finetune/extract_adapter", wide("custom_config", "x")),
    "a hundred thousand wrong ranks": (
        "/v1/finetune/extract_adapter",
        json.dumps({"fine_tuning_job_id": "j", "custom_config": ["x"] * 99_999}).encode(),
    ),
    "many ranks": ("/v1/finetune/extract_adapter", wide("custom_config", 8)),
    "gzip": ("/v1/models", gzip.compress(b"[" * 50_000_000)),
}  # fmt: skip
LORA = {
    "many modules": ("target_modules", "q_proj"),
    "many wrong modules": ("target_modules", "?"),
    "many groups": ("target_module_groups", ["q_proj"]),
    "many spaces": ("search_space", "8,4"),
    "many wrong spaces": ("search_space", ["x"]),
}
BODIES |= {
    name: ("/v1/fine_tuning/jobs", b'{"training_file":"f","General":' + block("lora_config", *field) + b"}")
    for name, field in LORA.items()
}


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES)
def test_a_json_body_that_is_a_bomb_is_refused_at_once(
    server: ServiceProcess, path: str, body: bytes
) -> None:
    answer = server.http.post(path, content=body, timeout=20)
    assert 400 <= answer.status_code < 500, answer.text[:1000]
    assert len(answer.content) < 5000
    assert answer.json()["error"]["message"]


def test_a_compressed_body_is_415_on_every_route(server: ServiceProcess) -> None:
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip", "GZIP"):
        for path in ("/v1/models", "/v1/files", "/v1/fine_tuning/jobs"):
            headers = MULTIPART | {"content-encoding": encoding}
            answer = server.http.post(path, content=gzip.compress(b"{}"), headers=headers)
            assert answer.status_code == 415
            assert answer.json()["error"]["code"] == "unsupported_encoding"
            assert "send it as it is" in answer.json()["detail"]
    headers = {"content-encoding": "identity"}
    assert server.http.post("/v1/models", content=b"{}", headers=headers).status_code == 422


def archive() -> bytes:
    """A ZIP file of some kilobytes with a gigabyte in it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file, file.open("train.json", "w") as stream:
        for _ in range(100):
            stream.write(b"[" * 10 * MEGABYTE)
    return content.getvalue()


@pytest.mark.usefixtures("flat")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [(gzip.compress(b"[" * 100_000_000), "is compressed with gzip"), (archive(), "is a ZIP archive")],
    ids=["gzip", "zip"],
)
def test_an_archive_as_data_fails_its_job_and_is_not_unpacked(
    server: ServiceProcess, content: bytes, sentence: str
) -> None:
    if not (server.models_dir / MODEL).exists():
        save_tiny_model(server.models_dir / MODEL)
    file = server.openai.files.create(file=("train.json", content), purpose="fine-tune")
    job = server.openai.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    deadline = time.monotonic() + 30
    while job.status == "validating_files" and time.monotonic() < deadline:
        time.sleep(0.05)
        job = server.openai.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "invalid_training_file"
    assert sentence in job.error.message


@pytest.mark.usefixtures("flat")
def test_long_heads_and_long_queries_are_refused(server: ServiceProcess) -> None:
    for headers in ({"x-long": "x" * 5_000_000}, {f"x-{n}": "y" for n in range(300_000)}):
        assert status_with(server, headers) in (400, 431, None)
    query = "&".join(f"metadata[k{n}]=v" for n in range(700))
    answer = server.http.get(f"/v1/fine_tuning/jobs?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "metadata")
    assert "metadata is asked for 700 times; 16 are allowed" in answer.json()["detail"]
    few = "&".join(f"metadata[k{n}]=v" for n in range(16))
    assert server.http.get(f"/v1/fine_tuning/jobs?{few}").json()["data"] == []
    ranges = "bytes=" + ",".join(f"{n}-" for n in range(2000))
    file = server.openai.files.create(file=("a", b"x" * 5000), purpose="user_data")
    answer = server.http.get(f"/v1/files/{file.id}/content", headers={"range": ranges})
    assert len(answer.content) <= 5200


def status_with(server: ServiceProcess, headers: dict[str, str]) -> int | None:
    """The status of an answer to a request with these headers; ``None`` when they are not even read."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with connection(server) as line:
        try:
            line.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
            return int(line.recv(100).split()[1])
        except ConnectionError:
            return None


def connection(service: ServiceProcess) -> socket.socket:
    host, _, port = service.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_slow_bodies_and_those_of_strangers_are_not_waited_for(make_server: Any) -> None:
    service = make_server(FINETUNING_API_KEYS="key", FINETUNING_BODY_SECONDS="1")
    head = "POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
    with connection(service) as stranger:
        stranger.sendall(f"{head}\r\n{{".encode())
        assert stranger.recv(100).startswith(b"HTTP/1.1 401")
    slow = [connection(service) for _ in range(50)]
    for number, line in enumerate(slow):
        kind = "multipart/form-data; boundary=b" if number % 2 else "application/json"
        line.sendall(f"{head}Authorization: Bearer key\r\nContent-Type: {kind}\r\n\r\n{{".encode())
    assert httpx.get(f"{service.url}/health", timeout=5).is_success
    for line in slow:
        assert line.recv(100).startswith(b"HTTP/1.1 408")
        line.close()
    answer = service.http.post("/v1/models", json={"id": "a", "path": "b"})
    assert answer.status_code == 422


def test_an_upload_that_drips_does_not_hold_its_place_for_ever(make_server: Any) -> None:
    service = make_server(FINETUNING_UPLOAD_IDLE_SECONDS="1")
    head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    with connection(service) as line:
        line.sendall(head.encode())
        line.settimeout(0.3)
        answer, began = b"", time.monotonic()
        while not answer:
            assert time.monotonic() - began < 15
            with suppress(TimeoutError):
                answer = line.recv(1000)
            if not answer:
                line.sendall(b"x")
    assert answer.startswith(b"HTTP/1.1 408")


FLOORS = {
    "starlette": (0, 49, 1),  # CVE-2025-62727: quadratic work on a Range header
    "python-multipart": (0, 0, 22),  # CVE-2024-53981: a log line for each byte; CVE-2026-24486
    "h11": (0, 16, 0),  # CVE-2025-43859: where one request ends and another begins
    "aiohttp": (3, 13, 3),  # CVE-2025-69223 and others: bombs, from Ray's side
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


@pytest.mark.parametrize(("library", "floor"), FLOORS.items())
def test_what_reads_requests_is_new_enough(library: str, floor: tuple[int, ...]) -> None:
    assert numbers(version(library)) >= floor
    pins = dict(
        line.split(" ")[0].split("==")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line
    )
    assert numbers(pins[library]) >= floor


def test_nothing_of_ray_is_published_or_opened_to_others() -> None:
    outside = [
        ROOT / "Dockerfile",
        ROOT / "Makefile",
        *ROOT.glob("*compose*"),
        *(ROOT / "examples").glob("*"),
    ]
    code = list((ROOT / "comps").rglob("*.py"))
    text = {path: path.read_text(encoding="utf-8") for path in (*outside, *code) if path.is_file()}
    lines = [line for content in text.values() for line in content.splitlines() if "0.0.0.0" in line]
    assert lines == ["ENV FINETUNING_HOST=0.0.0.0 \\"]
    for path in set(outside) & text.keys():
        # The dashboard, Ray's clients, its control store.
        assert not any(port in text[path] for port in ("8265", "10001", "6379")), path
    exposed = [line for line in text[ROOT / "Dockerfile"].splitlines() if line.startswith("EXPOSE")]
    assert exposed == ["EXPOSE 8015"]
