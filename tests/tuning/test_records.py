"""Reading and validating files of records."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from comps.tuning.data import formats
from comps.tuning.data.records import iter_records, validate_file
from comps.tuning.errors import DataError

ALPACA = [
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
    {"instruction": "Füge hinzu.", "input": 'eins, "zwei"\nund drei', "output": "Ünïcode 🙂, and a comma"},
]


def write(directory: Path, data: bytes | str | list[Any], name: str = "train.json") -> Path:
    path = directory / name
    if isinstance(data, list):
        data = json.dumps(data, ensure_ascii=False)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_as(directory: Path, format: str, records: list[dict[str, str]]) -> Path:
    path = directory / "stored-without-suffix"
    if format == "json":
        path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    elif format == "jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    elif format == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return path


def fault(path: Path, task: str = "instruction_tuning", name: str = "train.json", **options: Any) -> str:
    with pytest.raises(DataError) as raised:
        validate_file(path, name, task, **options)
    message = str(raised.value)
    assert message.startswith(name)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_records_and_is_told_from_its_content(
    tmp_path: Path, format: str
) -> None:
    path = write_as(tmp_path, format, ALPACA)
    assert [record for _, record in iter_records(path)] == ALPACA
    summary = validate_file(path, "upload", "instruction_tuning")
    assert (summary.records, summary.shape, summary.format) == (2, "alpaca", format)


@pytest.mark.parametrize(("delimiter", "name"), [(";", "export.csv"), ("\t", "export.tsv")])
def test_csv_from_a_spreadsheet_may_be_divided_by_semicolons_or_tabs(
    tmp_path: Path, delimiter: str, name: str
) -> None:
    path = write(tmp_path, f"\ufeffprompt{delimiter}completion\r\na{delimiter}b\r\n")
    assert list(iter_records(path, name)) == [(2, {"prompt": "a", "completion": "b"})]


def test_line_and_record_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    lines = write(tmp_path, '\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [number for number, _ in iter_records(lines)] == [2, 4]
    table = write(tmp_path, 'prompt,completion\n"a\nb",c\nd,e\n', "t.csv")
    assert [number for number, _ in iter_records(table)] == [2, 4]
    array = write(tmp_path, '[\n{"text": "a"},\n\n{"text": "b"}]')
    assert [number for number, _ in iter_records(array)] == [1, 2]


VALUES = st.text(max_size=30) | st.lists(st.floats(allow_nan=False, allow_infinity=False))
RECORDS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), max_size=8)


@given(RECORDS, st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_json_array_reads_the_same_wherever_the_chunks_cut_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: list[dict[str, Any]],
    chunk: int,
    ascii: bool,
    indent: int | None,
) -> None:
    path = write(tmp_path, json.dumps(records, ensure_ascii=ascii, indent=indent))
    monkeypatch.setattr(formats, "_CHUNK", chunk)
    assert [record for _, record in iter_records(path)] == records


def test_memory_stays_bounded_however_large_the_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_CHUNK", 1 << 16)
    record = json.dumps({"text": "word " * 400})
    array = write(tmp_path, "[" + ",\n".join([record] * 5000) + "]")
    lines = write(tmp_path, "\n".join([record] * 5000), "train.jsonl")
    for path in (array, lines):
        assert path.stat().st_size > 9_000_000
        tracemalloc.start()
        validate_file(path, path.name, "pretraining")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "train.json: is empty"),
        (b"  \n\t ", "train.json: is empty"),
        (b"\xef\xbb\xbf", "train.json: is empty"),
        ("[]", "train.json: holds no usable record"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"\xff\xfe{\x00", "UTF-16"),
        ("once upon a time", "is neither a JSON array nor"),
        ('"a string"', "is neither a JSON array nor"),
        ('[{"instruction": "a", "output": "b"}', "line 1: the file ends after record 1"),
        ('[{"instruction": "a", "output": "b"}\n;', "line 2: ';' follows after record 1"),
        ('[{"instruction": "a", "output": "b"},\n]', "record 2: is not valid JSON"),
        ('[{"instruction": "a", "output": "b"}] x', "line 1: text follows the JSON array"),
        ('[{"instruction": "a", "output": "b"}, {"instruction', "record 2: is not valid JSON"),
        ('[1, 2]', "record 1: is not a JSON object"),
        ('[{"instruction": "a", "output": 1e999}]', "record 1: the number 1e999 is too large"),
        ('[{"instruction": "a", "output": NaN}]', "record 1: NaN is not JSON"),
        ('[{"instruction": "a", "output": %s}]' % ("9" * 5000), "record 1: the number 9999"),
        ('{"instruction": "a"\n', "line 1: is not valid JSON"),
        ('{"instruction": "a", "output": "b"}\n{"x":', "line 2: is not valid JSON"),
        ('{"instruction": "a", "output": "b"}\n[]', "line 2: is not a JSON object"),
        (b'{"instruction": "a", "output": "\xe9"}', "line 1: byte 33 is not UTF-8"),
        (b'[{"instruction": "a", "output": "\xe9"}]', "byte 34 of the file is not UTF-8"),
        ('[{"instruction": "a", "output": "b\\ud800"}]', "'output' has a lone surrogate at character 2"),
        ('[{"instruction": "a", "output": 5}]', "record 1: 'output' must be a string, not a number"),
        ('[{"instruction": null, "output": "b"}]', "record 1: 'instruction' must be a string, not null"),
        ('[{"instruction": "a", "input": ["b"], "output": "c"}]', "'input' must be a string, not a list"),
        ('[{"instruction": "a", "output": " \\n"}]', "record 1: 'output' is empty"),
        ('[{"prompt": "a", "completion": ""}]', "record 1: 'completion' is empty"),
        ('[{"question": "a", "reply": "b"}]', "record 1: has 'question', 'reply', which is no shape"),
        ('[{}]', "record 1: has no fields"),
        ('[{"prompt": "a", "chosen": "b", "rejected": "c"}]', "record 1: is a preference pair, and"),
        ('[{"input": "a", "preferred_output": [], "non_preferred_output": []}]', "(DPO) is not offered"),
        ('[{"text": "a"}]', "record 1: is of the shape plain text, but instruction_tuning takes Alpaca"),
        ('prompt,completion\na,b,c\n', "line 2: has 3 values for 2 columns"),
        ('prompt,completion\na,"b\n', "line 2: is not valid CSV"),
        (b"PAR1 and then nothing of the kind", "is not a readable Parquet file"),
        ('[{"messages": []}]', "'messages' must be a list of at least one message"),
        ('[{"messages": ["hi"]}]', "'messages[0]' must be an object"),
        ('[{"messages": [{"role": "boss", "content": "x"}]}]', "'messages[0].role' must be one of"),
        ('[{"messages": [{"role": "user", "content": null}]}]', "'messages[0].content' must be a string"),
        ('[{"messages": [{"role": "user", "content": "x"}]}]', "the last message must be the assistant's"),
        ('[{"messages": [{"role": "assistant", "content": "x"}]}]', "has no message of the user"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_a_sentence_that_says_where(
    tmp_path: Path, content: bytes | str, sentence: str
) -> None:
    assert sentence in fault(write(tmp_path, content))


def test_a_missing_file_and_a_directory_are_refused_in_a_sentence(tmp_path: Path) -> None:
    assert fault(tmp_path / "none") == "train.json: cannot be read: No such file or directory"
    assert fault(tmp_path) == "train.json: cannot be read: Is a directory"


@pytest.mark.parametrize("prefix", ["", '{"instruction": "a", "output": "b"}\n'], ids=["json", "jsonl"])
@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_deep_nesting_is_refused_without_exhausting_the_stack(
    tmp_path: Path, prefix: str, bracket: str
) -> None:
    content = prefix + ("" if prefix else "[") + '{"instruction": ' + bracket * 100_000
    assert "is nested too deeply" in fault(write(tmp_path, content))


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.csv"])
def test_a_record_above_the_limit_is_refused_without_being_read_whole(tmp_path: Path, name: str) -> None:
    starts = {"train.json": '[{"text": "', "train.jsonl": '{"text": "', "train.csv": "text\n"}
    path = write(tmp_path, starts[name] + "x" * 50_000_000, name)
    tracemalloc.start()
    assert "is larger than 1,000,000 bytes" in fault(path, "pretraining", name, limit=1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_large_parquet_record_is_refused(tmp_path: Path) -> None:
    path = write_as(tmp_path, "parquet", [{"text": "a"}, {"text": "b" * 5000}])
    assert fault(path, "pretraining", limit=1000) == "train.json, record 2: is larger than 1,000 bytes"


def test_many_large_parquet_records_are_not_in_memory_at_once(tmp_path: Path) -> None:
    path = write_as(tmp_path, "parquet", [{"text": "x" * 1_000_000}] * 256)
    assert path.stat().st_size < 2_000_000
    code = (
        "import sys, pyarrow; from pathlib import Path; from comps.tuning.data.records import iter_records\n"
        "assert sum(1 for _ in iter_records(Path(sys.argv[1]))) == 256\n"
        "print(pyarrow.default_memory_pool().max_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000_000


def test_a_csv_record_of_many_lines_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    columns, line = 50, "x" * 98 + "\n"
    cells = ",".join(['"' + line * 9_000 + '"'] * columns)  # 45 MB, of which no field passes the limit
    path = write(tmp_path, ",".join(["text", *map(str, range(1, columns))]) + "\n" + cells, "train.csv")
    tracemalloc.start()
    message = fault(path, "pretraining", "train.csv", limit=1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == "train.csv, line 2: is larger than 1,000,000 bytes"
    assert peak < 20_000_000


def test_a_csv_header_longer_than_a_small_limit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "text" + "x" * 200_000, "train.csv")
    assert fault(path, name="train.csv", limit=1000) == "train.csv, line 1: is larger than 1,000 bytes"


@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "parquet"])
def test_the_limit_counts_bytes_and_not_characters(tmp_path: Path, format: str) -> None:
    path = write_as(tmp_path, format, [{"text": "a"}, {"text": "ü" * 400}])
    if format in ("json", "jsonl"):
        path.write_bytes(path.read_bytes().replace(b"\\u00fc", "ü".encode()))
    name = f"train.{format}"
    assert "is larger than 700 bytes" in fault(path, "pretraining", name, limit=700)
    assert validate_file(path, name, "pretraining", limit=900).records == 2


@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "parquet"])
def test_a_file_of_more_records_than_allowed_is_refused_at_the_first_one_beyond(
    tmp_path: Path, format: str
) -> None:
    path = write_as(tmp_path, format, [{"text": str(number)} for number in range(5)])
    name = f"train.{format}"
    assert validate_file(path, name, "pretraining", max_records=5).records == 5
    assert fault(path, "pretraining", name, max_records=4).endswith(": the file has more than 4 records")


def test_a_record_of_another_shape_than_the_first_is_refused_naming_both(tmp_path: Path) -> None:
    path = write(tmp_path, [ALPACA[0], {"prompt": "a", "completion": "b"}])
    assert fault(path) == (
        "train.json, record 2: is of the shape prompt and completion, but the file began with "
        "Alpaca (instruction, input, output)"
    )
    path = write(tmp_path, [ALPACA[0], {"instruction": "a"}])
    assert "record 2: has no field 'output', but the file began with Alpaca" in fault(path)


def test_pretraining_takes_plain_text_only_and_passes_over_empty_texts(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": "b"}])
    summary = validate_file(path, "train.json", "pretraining")
    assert (summary.records, summary.warnings) == (2, ())
    assert "but pretraining takes plain text" in fault(write(tmp_path, ALPACA), "pretraining")
    assert "holds no usable record" in fault(write(tmp_path, [{"text": ""}]), "pretraining")


def test_a_stray_empty_output_in_a_large_file_is_left_out_and_named(tmp_path: Path) -> None:
    records = [ALPACA[0]] * 199
    empty = {"instruction": "a", "output": ""}
    summary = validate_file(write(tmp_path, [*records, empty]), "train.json", "instruction_tuning")
    assert summary.records == 199
    assert summary.warnings == ("1 record was left out because 'output' is empty: train.json, record 200",)
    many = write(tmp_path, [*records, empty, empty, empty])
    assert fault(many) == "train.json, record 200: 'output' is empty, as are 2 more records"


def test_a_byte_order_mark_is_accepted_in_every_text_format(tmp_path: Path) -> None:
    for name, content in (("a.json", '[{"text": "x"}]'), ("a.jsonl", '{"text": "x"}'), ("a.csv", "text\nx")):
        path = write(tmp_path, b"\xef\xbb\xbf" + content.encode(), name)
        assert [record for _, record in iter_records(path)] == [{"text": "x"}]


def test_validation_needs_neither_torch_nor_transformers() -> None:
    forbidden = "{'torch', 'transformers', 'datasets', 'pyarrow'}"
    code = f"import sys, comps.tuning.data.records; assert not {forbidden} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
