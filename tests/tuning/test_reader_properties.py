"""Any bytes are records, or a fault that says where: never another error, nor memory without bounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from service_process import ROOT

from comps.tuning.data import formats
from comps.tuning.data.apart import validate_safely
from comps.tuning.data.records import iter_checked, validate_file
from comps.tuning.errors import DataError

MB = 1_000_000
NAME = "data {set}%s.json"
# The place that a message begins with: the file, or a record or line of it.
PLACE = re.compile(re.escape(NAME) + r"(, (line|record) [1-9]\d*)?: \S")
LIMIT = 2000

many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
RECORDS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello 🙂"},
    {"prompt": "a", "completion": "b"},
    {"text": "one\ntwo"},
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 1}]},
]


def check(path: Path, content: bytes) -> None:
    """What every file must do, whichever task it is for."""
    path.write_bytes(content)
    for task in ("instruction_tuning", "pretraining"):
        try:
            summary = validate_file(path, NAME, task, limit=LIMIT)
        except DataError as error:
            message = str(error)
            assert PLACE.match(message), message
            assert message.replace("\t", " ").isprintable(), message
            assert len(message) < 1000
        else:
            read = list(iter_checked(path, NAME, task, limit=LIMIT))
            assert 0 < summary.records == len(read)
            assert all(PLACE.match(f"{each.where}: x") for each in read)


def encoded(records: list[dict[str, object]]) -> list[bytes]:
    """The records as an array, indented or not, and as lines."""
    return [
        json.dumps(records).encode(),
        json.dumps(records, ensure_ascii=False, indent=1).encode(),
        "\n".join(json.dumps(record) for record in records).encode(),
    ]


VALID = [
    *(content for record in RECORDS for content in encoded([record] * 3)),
    b'instruction,input,output\na,,b\n"c\n""d""",e,f\n',
    b"\xef\xbb\xbfprompt;completion\r\na;b\r\n",
    b"text\tother\nx\ty\n",
]
# What breaks parsers: structure, quotes, odd numbers and characters, and broken UTF-8.
PIECES = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\n", b"\r", b"\0", b"\t", b"'", b";", b"[" * 300,
    b'{"a":' * 300, b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 500, b"1E+400", b"\\ud800", b"\\udc00",
    b"\\u0000", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80", b"\xef\xbb\xbf",
    b"true", b"null", b"//", b"/*", b'"text":', b'"output":5', b'"messages":', b'{"role":"system"}', b'""',
    b"x" * 3000, b" " * 5000, b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"\xff\xfe", b"\xe2\x80\xa8", b"\x0c",
    b"\x1c", b"\xc2\x85",
]  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 20), st.sampled_from(PIECES)), max_size=4)


@many
@given(st.sampled_from(VALID), EDITS)
def test_a_good_file_with_faults_in_it(
    tmp_path: Path, content: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    for start, length, piece in edits:
        content = content[:start] + piece + content[start + length :]
    check(tmp_path / "file", content)


@many
@given(st.binary(max_size=300) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join))
@example(b"\n\n[")
@example(b"\xef\xbb\xbf")
@example(b'\n"text\n')
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    check(tmp_path / "file", content)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([[], {}, ""])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from(
    [
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "messages",
        "text",
        "role",
        "content",
        "weight",
    ]
)
MESSAGES = st.lists(
    st.dictionaries(FIELDS, VALUES | st.sampled_from(["user", "assistant"]), max_size=3), max_size=3
)


@many
@given(st.lists(st.dictionaries(FIELDS, VALUES | MESSAGES, max_size=4) | VALUES, max_size=4), st.booleans())
def test_fields_of_any_kind(tmp_path: Path, records: list[object], lines: bool) -> None:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    check(tmp_path / "file", text.encode())


@many
@given(st.sampled_from(VALID), EDITS, st.integers(1, 50))
def test_an_array_is_good_or_not_wherever_the_chunks_are_cut(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    edits: list[tuple[int, int, bytes]],
    chunk: int,
) -> None:
    for start, length, piece in edits:
        content = content[:start] + piece + content[start + length :]
    (tmp_path / "file").write_bytes(content)

    def records() -> list[object] | None:
        try:
            return list(formats.read_records(tmp_path / "file", NAME, "json", LIMIT))
        except DataError:  # which one depends on what of the file is there when it is met
            return None

    whole = records()
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_CHUNK", chunk)
        assert records() == whole


ROWS = [
    {"text": f"row {n} " * 3, "other": n, "messages": [{"role": "user", "content": "x"}]} for n in range(30)
]


def parquet_files(directory: Path) -> list[bytes]:
    """One table in several encodings."""
    found = []
    options: list[dict[str, object]] = [
        {"compression": "none"}, {"compression": "snappy"}, {"compression": "zstd", "use_dictionary": False},
        {"compression": "gzip", "data_page_version": "2.0"},
    ]  # fmt: skip
    for each in options:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), directory / "table", **each)
        found.append((directory / "table").read_bytes())
    return found


def test_a_damaged_parquet_file_is_a_fault_whatever_the_damage(tmp_path: Path) -> None:
    """In a seeded loop of its own: the reader is C++, and its bugs would end the process."""
    random = Random(1)
    files = parquet_files(tmp_path)
    for _ in range(1500):
        content = bytearray(random.choice(files))
        for _ in range(random.randint(1, 6)):
            # Most of what can be wrong is in the footer.
            near_end = random.random() < 0.5
            place = random.randrange(max(0, len(content) - 2000) if near_end else 0, len(content))
            length = random.choice([1, 1, 1, random.randrange(20)])
            content[place : place + length] = random.randbytes(
                random.choice([1, length, random.randrange(9)])
            )
        check(tmp_path / "file", bytes(content))


def test_what_is_said_of_a_parquet_file_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "it's $(odd)"
    table = pyarrow.Table.from_pylist([*[{"text": "a"}] * 3, {"text": ""}])
    parquet.write_table(table, path)
    assert validate_safely(path, NAME, "pretraining") == validate_file(path, NAME, "pretraining")
    for task, limits in (("instruction_tuning", {}), ("pretraining", {"limit": 1})):
        said = []
        for validate in (validate_file, validate_safely):
            with pytest.raises(DataError) as raised:
                validate(path, NAME, task, **limits)
            said.append((type(raised.value), str(raised.value)))
        assert said[0] == said[1]


def test_the_process_that_reads_parquet_has_no_secrets_and_not_all_the_time_of_the_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    spy = "import os, pathlib; pathlib.Path(__file__).with_name('seen').write_text(str(dict(os.environ)))"
    (tmp_path / "sitecustomize.py").write_text(spy)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("FINETUNING_API_KEYS", "canary")
    assert validate_safely(path, NAME, "pretraining").records == 1
    seen = (tmp_path / "seen").read_text()
    assert "ARROW_DEFAULT_MEMORY_POOL" in seen
    assert "canary" not in seen
    monkeypatch.setattr("comps.tuning.data.apart.LONGEST", 0.01)
    with pytest.raises(DataError, match=r"takes longer than 0\.01 seconds to read"):
        validate_safely(path, NAME, "pretraining")


MEASURE = """
import re, sys
from pathlib import Path
from comps.tuning.data.apart import validate_safely
from comps.tuning.errors import DataError

def peak():  # what getrusage has is that of the process before, too
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

before = peak()
try:
    print(validate_safely(Path(sys.argv[1]), "big", "pretraining", limit=1_000_000).records)
except DataError as error:
    print(error)
print(peak() - before)
"""


def outcome_and_megabytes(path: Path) -> tuple[str, int]:
    """What a process of its own says to a file, and by how much its memory grew at most."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said, grown = done.stdout.splitlines()
    return said, int(grown)


# How the file begins, what follows again and again, whether that goes on to its end, and what
# is said of it.
BIG = {
    "a JSON array with one endless string": (b'[{"text": "', b"x" * MB, False, "record 1: is larger than"),
    "a line without an end": (b'{"text": "', b"x" * MB, False, "line 1: is larger than"),
    "a CSV field without an end": (b"text\n", b"x" * MB, False, "line 2: is larger than"),
    "a number without an end": (b'[{"text": ', b"9" * MB, False, "record 1"),
    "backslashes": (b'[{"text": "', b"\\\\" * (MB // 2), False, "record 1: is larger than"),
    "brackets": (b"", b"[" * MB, False, "nested too deeply"),
    "nothing but blanks": (b"", b" \n" * (MB // 2), True, "is empty"),
    "blanks within an array": (b"[", b" \n" * (MB // 2), True, "is not valid JSON"),
    "lines of good records": (b"", (b'{"text": "' + b"x" * 987 + b'"}\n') * 1000, True, "200000"),
    "an array of good records": (
        b'[{"text": "a"}',
        (b',{"text": "' + b"x" * 987 + b'"}') * 1000,
        True,
        "ends",
    ),
    "a CSV of good records": (b"text\n", (b"x" * 999 + b"\n") * 1000, True, "200000"),
}


@pytest.mark.parametrize(("start", "block", "whole", "said"), BIG.values(), ids=BIG)
def test_two_hundred_megabytes_of_anything_take_little_memory(
    tmp_path: Path, start: bytes, block: bytes, whole: bool, said: str
) -> None:
    path = tmp_path / "big"
    with open(path, "wb") as stream:
        stream.write(start)
        for _ in range(200 if whole else 10):
            stream.write(block)
        stream.truncate(max(200 * MB, stream.tell()))  # the rest of a file that nobody reads is a hole
    outcome, megabytes = outcome_and_megabytes(path)
    path.unlink()
    assert said in outcome
    assert megabytes < 40


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, use_dictionary: bool) -> None:
    """A dictionary of one long text for many rows; one page with a longer text than is allowed."""
    texts = ["x" * 9_000_000] * 64 if use_dictionary else ["x" * 600_000_000]
    path = tmp_path / "bomb.parquet"
    options = {"use_dictionary": use_dictionary, "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", **options)
    assert path.stat().st_size < 100_000
    outcome, megabytes = outcome_and_megabytes(path)
    assert "record 1: is larger than" in outcome or "record 1: takes more memory to unpack" in outcome
    assert megabytes < 40
