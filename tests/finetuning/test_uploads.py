"""Uploads in parts, for the official client: parts in any order become one file, once, or nothing."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from fixtures_uploads import announce, content, database_of, expire, send, state, stored, until
from service_process import ServiceProcess
from sqlalchemy import select

from comps.finetuning.schemas.uploads import MAX_PARTS
from comps.finetuning.store.blobs import Blobs
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import PartRow, UploadRow
from comps.finetuning.sweep import remove_expired_uploads

RECORDS = [b'{"prompt": "%d", "completion": "%d"}\n' % (number, number) for number in range(300)]
BODY = b"".join(RECORDS)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def refusal(answer: httpx.Response, status: int, code: str, param: str | None) -> str:
    """The sentence of a refusal, which is what was expected."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"].endswith(".")
    return str(error["message"])


def completes(server: ServiceProcess, upload: Any, **body: Any) -> httpx.Response:
    return server.http.post(f"/v1/uploads/{upload.id}/complete", json=body)


def test_parts_become_a_file_in_the_order_in_which_they_are_listed(server: ServiceProcess) -> None:
    upload = announce(server, 9)
    assert (upload.object, upload.status, upload.bytes, upload.file) == ("upload", "pending", 9, None)
    assert upload.expires_at == upload.created_at + 3600
    part = server.openai.uploads.parts.create(upload.id, data=b"second")
    assert (part.object, part.upload_id) == ("upload.part", upload.id)
    (first,) = send(server, upload, b"1st")
    assert {part.id, first} <= stored(server)
    done = server.openai.uploads.complete(upload.id, part_ids=[first, part.id], md5=md5(b"1stsecond").upper())
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.filename, done.file.bytes, done.file.purpose) == ("train.jsonl", 9, "fine-tune")
    assert server.openai.files.retrieve(done.file.id) == done.file
    assert content(server, done) == b"1stsecond"
    assert not {part.id, first} & stored(server)


def test_the_client_sends_a_file_in_parts_by_itself(server: ServiceProcess, tmp_path: Path) -> None:
    (tmp_path / "numbers.jsonl").write_bytes(BODY)
    kind: dict[str, Any] = {"mime_type": "application/jsonl", "purpose": "fine-tune", "part_size": 1000}
    uploads = server.openai.uploads
    from_disk = uploads.upload_file_chunked(file=tmp_path / "numbers.jsonl", md5=md5(BODY), **kind)
    from_memory = uploads.upload_file_chunked(file=BODY, filename="numbers.jsonl", bytes=len(BODY), **kind)
    for upload in (from_disk, from_memory):
        assert upload.filename == "numbers.jsonl"
        assert content(server, upload) == BODY


def test_a_client_that_lost_the_connection_sees_which_parts_are_there(server: ServiceProcess) -> None:
    upload = announce(server, 6)
    sent = send(server, upload, b"a", b"bb", b"ccc")
    found = state(server, upload)
    assert (found["status"], found["file"]) == ("pending", None)
    assert [(part["id"], part["bytes"]) for part in found["parts"]] == list(zip(sent, (1, 2, 3), strict=True))
    done = server.openai.uploads.complete(upload.id, part_ids=sent)
    assert state(server, upload) == done.model_dump() | {"parts": []}


def test_a_client_that_lost_the_answer_completes_again_and_gets_the_same(server: ServiceProcess) -> None:
    upload = announce(server, 2)
    parts = send(server, upload, b"a", b"b")
    first = completes(server, upload, part_ids=parts, md5=md5(b"ab"))
    again = completes(server, upload, part_ids=parts, md5=md5(b"ab"))
    assert (again.status_code, again.json()) == (200, first.json())
    file_id = first.json()["file"]["id"]
    for other in ({"part_ids": parts[::-1], "md5": md5(b"ab")}, {"part_ids": parts}):
        said = refusal(completes(server, upload, **other), 409, "upload_completed", "upload_id")
        assert said == f"The upload {upload.id} is completed: it became the file {file_id}."
    server.openai.files.delete(file_id)
    same = completes(server, upload, part_ids=parts, md5=md5(b"ab"))
    refusal(same, 409, "upload_completed", "upload_id")
    assert file_id not in stored(server)


def test_parts_come_side_by_side_and_one_of_several_completions_makes_the_file(
    server: ServiceProcess,
) -> None:
    upload = announce(server, len(BODY))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda record: send(server, upload, record)[0], RECORDS[:100]))
        parts += send(server, upload, b"".join(RECORDS[100:]))
        answers = list(pool.map(lambda _: completes(server, upload, part_ids=parts), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    (file_id,) = {answer.json()["file"]["id"] for answer in answers}
    assert server.openai.files.content(file_id).read() == BODY


def test_what_has_ended_takes_nothing_more_and_says_why(server: ServiceProcess) -> None:
    completed, cancelled, expired = (announce(server, 1) for _ in range(3))
    parts = {upload.id: send(server, upload, b"x") for upload in (completed, cancelled, expired)}
    server.openai.uploads.complete(completed.id, part_ids=parts[completed.id])
    assert server.openai.uploads.cancel(cancelled.id).status == "cancelled"
    expire(server, expired.id)
    assert not set(parts[cancelled.id]) & stored(server)
    said = [
        (completed, "completed", "is completed: it became the file file-"),
        (cancelled, "cancelled", "was cancelled."),
        (expired, "expired", "has expired: 3600 seconds are allowed from its creation to its completion."),
    ]
    for upload, status, sentence in said:
        assert state(server, upload)["status"] == status
        path = f"/v1/uploads/{upload.id}"
        requests = [
            server.http.post(f"{path}/parts", files={"data": b"x"}),
            completes(server, upload, part_ids=["part-other"]),
        ]
        if upload is not cancelled:  # which can be repeated
            requests.append(server.http.post(f"{path}/cancel"))
        for answer in requests:
            message = refusal(answer, 409, f"upload_{status}", "upload_id")
            assert message.startswith(f"The upload {upload.id} {sentence}")
            assert answer.headers["x-should-retry"] == "false"
    assert server.openai.uploads.cancel(cancelled.id).status == "cancelled"


def test_a_wrong_completion_is_refused_and_a_right_one_still_works(server: ServiceProcess) -> None:
    upload, other = announce(server, 4), announce(server, 2)
    parts = send(server, upload, b"ab", b"cd", b"ab")
    (foreign,) = send(server, other, b"cd")
    two, before = parts[:2], stored(server)
    said = refusal(completes(server, upload, part_ids=parts), 422, "size_mismatch", "part_ids")
    assert said == "part_ids: these parts hold 6 bytes, but the upload was announced with 4."
    refusal(completes(server, upload, part_ids=parts[:1]), 422, "size_mismatch", "part_ids")
    refusal(completes(server, upload, part_ids=parts[:1] * 2), 422, "invalid_value", "part_ids")
    refusal(completes(server, upload, part_ids=[parts[0], foreign]), 404, "part_not_found", "part_ids")
    refusal(completes(server, upload, part_ids=[parts[0], "../lock"]), 404, "part_not_found", "part_ids")
    refusal(completes(server, upload, part_ids=[]), 422, "invalid_value", "part_ids")
    refusal(completes(server, upload), 422, "invalid_value", "part_ids")
    refusal(completes(server, upload, part_ids=["x"] * (MAX_PARTS + 1)), 422, "invalid_value", "part_ids")
    refusal(completes(server, upload, part_ids=two, md5="abcd"), 422, "invalid_value", "md5")
    said = refusal(completes(server, upload, part_ids=two, md5=md5(b"cdab")), 422, "checksum_mismatch", "md5")
    assert md5(b"abcd") in said
    assert stored(server) == before
    done = server.openai.uploads.complete(upload.id, part_ids=[parts[1], parts[2]], md5=md5(b"cdab"))
    assert content(server, done) == b"cdab"


def test_of_a_completion_and_a_cancellation_at_once_one_wins(server: ServiceProcess) -> None:
    size = 16_000_000
    before = stored(server)
    upload = announce(server, 2 * size)
    parts = send(server, upload, b"x" * size, b"y" * size)
    with ThreadPoolExecutor() as pool:
        completing = pool.submit(completes, server, upload, part_ids=parts)
        until(lambda: stored(server) - before - set(parts), pause=0)
        cancelled = server.http.post(f"/v1/uploads/{upload.id}/cancel")
    completed = completing.result()
    if completed.is_success:
        refusal(cancelled, 409, "upload_completed", "upload_id")
        file_id = completed.json()["file"]["id"]
        assert stored(server) - before == {file_id}
        server.openai.files.delete(file_id)
    else:
        refusal(completed, 409, "upload_cancelled", "upload_id")
        assert cancelled.is_success
    assert stored(server) == before


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"bytes": 2**29 + 1}, 413, "bytes"),
    ({"bytes": 10**30}, 413, "bytes"),
    ({"bytes": 0}, 422, "bytes"),
    ({"bytes": -1}, 422, "bytes"),
    ({"bytes": True}, 422, "bytes"),
    ({"bytes": None}, 422, "bytes"),
    ({"filename": ""}, 422, "filename"),
    ({"filename": None}, 422, "filename"),
    ({"purpose": "fine_tune"}, 422, "purpose"),
    ({"purpose": None}, 422, "purpose"),
    ({"mime_type": "a\0b"}, 422, "mime_type"),
    ({"expires_after": {"anchor": "now", "seconds": 3600}}, 422, "expires_after.anchor"),
    ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, 422, "expires_after.seconds"),
]


@pytest.mark.parametrize(("changes", "status", "param"), WRONG)
def test_a_wrong_announcement_is_refused(
    server: ServiceProcess, changes: dict[str, Any], status: int, param: str
) -> None:
    body = {"filename": "a", "purpose": "evals", "bytes": 1, "mime_type": "text/csv"} | changes
    answer = server.http.post("/v1/uploads", json=body)
    message = refusal(answer, status, "too_large" if status == 413 else "invalid_value", param)
    if status == 413:
        assert "536870912 bytes (FINETUNING_MAX_UPLOAD_BYTES)" in message


def test_the_name_is_shown_and_unknown_keys_are_named(server: ServiceProcess) -> None:
    body = {"filename": "../../etc/pass\0wd", "purpose": "evals", "bytes": 1, "byte": 1}
    answer = server.http.post("/v1/uploads", json=body).json()
    assert (answer["filename"], answer["mime_type"]) == ("passwd", "application/octet-stream")
    assert answer["warnings"] == ["byte is not a known key and was ignored; did you mean bytes?"]


def test_the_file_lives_as_long_as_was_announced(server: ServiceProcess) -> None:
    upload = announce(server, 1, expires_after={"anchor": "created_at", "seconds": 7200})
    done = server.openai.uploads.complete(upload.id, part_ids=send(server, upload, b"x"))
    assert done.file is not None
    assert done.file.expires_at == done.file.created_at + 7200


def test_a_part_that_is_none_is_refused_and_leaves_nothing(server: ServiceProcess) -> None:
    upload = announce(server, 10)
    path, before = f"/v1/uploads/{upload.id}/parts", stored(server)
    missing = server.http.post(path, files={"x": (None, "plain")})
    assert "'data' is missing" in refusal(missing, 422, "invalid_value", "data")
    refusal(server.http.post(path, files={"data": (None, "plain")}), 422, "invalid_value", "data")
    refusal(server.http.post(path, files={"file": b"x"}), 422, "invalid_value", "data")
    assert refusal(server.http.post(path, files={"data": b""}), 422, "invalid_value", "data")
    refusal(server.http.post(path, files=[("data", b"x"), ("data", b"y")]), 422, "invalid_value", "data")
    refusal(server.http.post(path, json={"data": "x"}), 422, "invalid_value", None)
    said = refusal(server.http.post(path, files={"data": b"x" * 11}), 413, "too_large", "data")
    assert said == "The part is larger than the 10 bytes that were announced for the whole upload."
    assert stored(server) == before
    assert state(server, upload)["parts"] == []


def test_parts_may_be_repeated_but_not_for_ever(server: ServiceProcess) -> None:
    upload = announce(server, 10)
    parts = send(server, upload, *[b"0123456789"] * 3)
    answer = server.http.post(f"/v1/uploads/{upload.id}/parts", files={"data": b"x"})
    refusal(answer, 413, "too_many_parts", "upload_id")
    done = server.openai.uploads.complete(upload.id, part_ids=parts[1:2])
    assert content(server, done) == b"0123456789"
    assert not set(parts) & stored(server)


def test_an_upload_has_so_many_parts_and_no_more(server: ServiceProcess) -> None:
    upload = announce(server, 20_000)
    database = database_of(server)
    with database.session() as session:
        session.add_all(
            PartRow(id=f"{upload.id}-{n}", upload_id=upload.id, bytes=1) for n in range(MAX_PARTS)
        )
    answer = server.http.post(f"/v1/uploads/{upload.id}/parts", files={"data": b"x"})
    assert "10000 parts" in refusal(answer, 413, "too_many_parts", "upload_id")
    assert server.openai.uploads.cancel(upload.id).status == "cancelled"
    with database.reading() as session:
        assert session.scalar(select(PartRow.id).where(PartRow.upload_id == upload.id)) is None
    database.dispose()


@pytest.mark.parametrize("path", ["x/complete", "x/cancel", "x/parts/y", "x/y/parts", "x", ""])
def test_only_the_route_of_parts_takes_long_bodies(server: ServiceProcess, path: str) -> None:
    big = b"x" * 2_000_000
    answer = server.http.post(f"/v1/uploads/{path}".rstrip("/"), files={"data": big})
    assert "1048576 bytes (FINETUNING_MAX_BODY_BYTES)" in refusal(answer, 413, "too_large", None)


@pytest.mark.parametrize("upload_id", ["upload-none", "..", "%2e%2e%2flock", "x" * 300, "file-1", "%00"])
def test_an_upload_that_is_not_there_is_no_failure(server: ServiceProcess, upload_id: str) -> None:
    path, form = f"/v1/uploads/{upload_id}", {"data": b"x"}
    answers = [server.http.get(path), server.http.post(f"{path}/cancel")]
    answers += [server.http.post(f"{path}/complete", json={"part_ids": ["x"]})]
    answers += [server.http.post(f"{path}/parts", files=form)]
    for answer in answers:
        assert answer.status_code in (404, 405, 422), answer.text
    with pytest.raises(openai.NotFoundError, match="There is no upload 'none'"):
        server.openai.uploads.cancel("none")


def test_a_long_upload_costs_no_memory(server: ServiceProcess) -> None:
    size, times = 8_000_000, 12
    upload = announce(server, size * times)
    process = psutil.Process(server.process.pid)
    send(server, upload, b"x")  # so that what any upload needs is loaded already
    before = process.memory_info().rss
    parts = send(server, upload, *[b"0123456789abcdef" * (size // 16)] * times)
    done = server.openai.uploads.complete(upload.id, part_ids=parts)
    assert done.file is not None
    assert done.file.bytes == size * times
    assert process.memory_info().rss - before < 24 * 2**20
    server.openai.files.delete(done.file.id)


def test_the_hourly_sweep_ends_expired_uploads_and_forgets_old_ones(tmp_path: Path) -> None:
    database, blobs = Database(f"sqlite:///{tmp_path}/x.db"), Blobs(tmp_path)
    database.migrate()
    now = time.time()
    ages = {"fresh": -60.0, "over": 60.0, "completed": 60.0, "cancelled": 90_000.0, "forgotten": 90_000.0}
    with database.session() as session:
        for name, age in ages.items():
            status = name if name in ("completed", "cancelled") else "pending"
            fields = {"filename": "a", "purpose": "evals", "bytes": 1, "mime_type": "x"}
            session.add(UploadRow(id=name, status=status, expires_at=now - age, **fields))
            session.flush()
            if status == "pending":
                session.add(PartRow(id=f"part-{name}", upload_id=name, bytes=1))
                blobs.path(f"part-{name}").write_bytes(b"x")
    remove_expired_uploads(database, blobs)
    with database.reading() as session:
        left = {row.id: row.status for row in session.scalars(select(UploadRow))}
        parts = list(session.scalars(select(PartRow.id)))
    database.dispose()
    assert left == {"fresh": "pending", "over": "expired", "completed": "completed"}
    assert parts == ["part-fresh"]
    assert {path.name for path in tmp_path.glob("part-*")} == {"part-fresh"}


def test_an_upload_that_is_begun_again_with_its_key_is_the_same_one(server: ServiceProcess) -> None:
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 3, "mime_type": "application/jsonl"}
    headers = {"Idempotency-Key": "begin-an-upload"}
    first, again = (server.http.post("/v1/uploads", json=body, headers=headers) for _ in range(2))
    assert first.status_code == 200, first.text
    assert again.json() == first.json()
    other = server.http.post("/v1/uploads", json=body | {"bytes": 4}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
