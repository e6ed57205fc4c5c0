"""Uploads, good, bad, huge and cut short; downloads; deletions."""

from __future__ import annotations

import hashlib
import socket
from typing import Any

from tests.soak import bodies
from tests.soak.asking import Asking
from tests.soak.plans import pick
from tests.soak.world import MAX_UPLOAD


class OnFiles(Asking):
    """What clients do with files. Methods are named after actions and return what came of it."""

    def _send(self, content: bytes, *allowed: int, purpose: str = "fine-tune") -> str | None:
        files = {"file": ("numbers.json", content)}
        answer = self.ask("POST", "/v1/files", *allowed, files=files, data={"purpose": purpose})
        if answer is None or answer.status_code != 200:
            return None
        file_id = str(answer.json()["id"])
        self.world.promises.files[file_id] = hashlib.sha256(content).hexdigest()
        return file_id

    def upload(self, form: str, records: int) -> object:
        if file_id := self._send(bodies.records(form, records)):
            self.world.promises.good_files.append(file_id)
        return file_id

    def upload_bad(self, fault: str) -> object:
        if file_id := self._send(bodies.bad_records(fault)):
            self.world.promises.bad_files.append(file_id)
        return file_id

    def upload_refused(self, fault: str) -> object:
        fields: dict[str, str] = {"purpose": "fine-tune"}
        files: Any = {"file": ("a.json", b"" if fault == "empty" else b"x")}
        if fault == "no purpose":
            fields = {}
        elif fault == "unknown purpose":
            fields = {"purpose": "world peace"}
        elif fault == "two files":
            files = [("file", ("a.json", b"x")), ("file", ("b.json", b"x"))]
        elif fault == "not multipart":
            return self.ask("POST", "/v1/files", 422, content=b'{"file": "a"}')
        return self.ask("POST", "/v1/files", 422, files=files, data=fields)

    def upload_huge(self, bytes: int) -> object:
        """Stored, read again, deleted."""
        file_id = self._send(b"0123456789abcdef" * (bytes // 16), purpose="user_data")
        return file_id and (self._read(file_id), self._delete_file(file_id))

    def upload_too_big(self) -> object:
        files = {"file": ("a", b"x" * (MAX_UPLOAD + 1))}
        return self.ask("POST", "/v1/files", 413, files=files, data={"purpose": "fine-tune"})

    def upload_cut(self, bytes: int) -> object:
        """Hangs up in the midst of an upload."""
        address = self.world.service.url.removeprefix("http://")
        host, port = address.split(":")
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: {address}\r\nContent-Length: 9000000\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        try:
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(head.encode() + b"x" * bytes)
        except OSError as error:  # the service went down
            return error
        return "hung up"

    def _read(self, file_id: str) -> object:
        answer = self.ask("GET", f"/v1/files/{file_id}/content", 200, 404)
        if answer is None:
            return None
        promises = self.world.promises
        if answer.status_code == 404 and file_id not in promises.deleted_files:
            self.world.violation(f"the file {file_id} is gone, and nobody deleted it")
        elif answer.is_success and hashlib.sha256(answer.content).hexdigest() != promises.files[file_id]:
            self.world.violation(f"the file {file_id} is not what was uploaded")
        return answer

    def download(self, file: float) -> object:
        file_id = pick([*self.world.promises.files], file)
        return file_id and self._read(file_id)

    def _delete_file(self, file_id: str) -> object:
        # Before the answer, which may be lost.
        self.world.promises.deleted_files.add(file_id)
        answer = self.ask("DELETE", f"/v1/files/{file_id}", 200, 404, 409)
        if answer is not None and answer.status_code == 409:
            self.world.promises.deleted_files.discard(file_id)
        return answer

    def delete_file(self, file: float) -> object:
        left = [each for each in self.world.promises.files if each not in self.world.promises.deleted_files]
        file_id = pick(left, file)
        return file_id and self._delete_file(file_id)
