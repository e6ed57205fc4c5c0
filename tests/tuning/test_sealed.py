"""A sealed token opens with its key alone, and reaches a run's environment only."""

from __future__ import annotations

import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from comps.tuning import attempt, rundir, sealed
from comps.tuning.errors import TuningError


@pytest.fixture
def key(tmp_path: Path) -> Path:
    sealed.make_key(tmp_path / "key")
    return tmp_path / "key"


def test_a_token_comes_back_whole_and_is_not_to_be_seen_in_between(key: Path) -> None:
    closed = sealed.seal("hf_tökén", key)
    assert "hf_" not in closed
    assert sealed.unseal(closed, key) == "hf_tökén"
    assert sealed.seal("hf_tökén", key) != closed, "the same token does not look the same twice"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_key_that_is_there_stays(key: Path) -> None:
    closed = sealed.seal("hf_token", key)
    sealed.make_key(key)
    assert sealed.unseal(closed, key) == "hf_token"


@pytest.mark.parametrize("content", [None, b"", b"not a key"])
def test_without_its_key_it_says_what_to_do(key: Path, content: bytes | None) -> None:
    closed = sealed.seal("hf_token", key)
    key.unlink()
    sealed.make_key(key) if content is None else key.write_bytes(content)
    with pytest.raises(TuningError, match="create the job again") as raised:
        sealed.unseal(closed, key)
    assert raised.value.param == "General.config.token"


def test_a_run_finds_the_token_where_the_hub_library_looks(
    key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sealed.SEALED, sealed.seal("hf_token", key))
    monkeypatch.setenv(sealed.KEY_FILE, str(key))
    monkeypatch.setenv("HF_TOKEN", "another")

    def work() -> dict[str, str | None]:
        from huggingface_hub import get_token

        return {"path": "", "token": get_token()}

    attempt.carry_out(tmp_path / "run", work)
    assert '"hf_token"' in (tmp_path / "run" / rundir.RESULT).read_text()


def test_of_many_who_make_the_key_at_once_all_have_the_same(tmp_path: Path) -> None:
    for attempt_number in range(20):
        key = tmp_path / f"key-{attempt_number}"
        barrier = threading.Barrier(8)

        def make(key: Path = key, barrier: threading.Barrier = barrier) -> str:
            barrier.wait()
            sealed.make_key(key)
            return sealed.seal("hf_token", key)

        with ThreadPoolExecutor(8) as pool:
            made = [pool.submit(make) for _ in range(8)]
        assert {sealed.unseal(each.result(), key) for each in made} == {"hf_token"}
    assert not list(tmp_path.glob(".*"))
