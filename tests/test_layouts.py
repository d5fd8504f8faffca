"""Files of every layout, read in the same way by every command: whole, or refused or rejected with the reason."""

import bz2
import codecs
import gzip
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from narrated import Narrated

from prmkit.dataset.conversion import convert
from prmkit.dataset.settings import Settings, Split
from prmkit.errors import DataError
from prmkit.files import read_jsonl
from prmkit.judge.scorer import ShapeOf
from prmkit.layouts import ANY_LENGTH, Rejected, open_lines, parse_line, read_lines
from prmkit.rows import read_row
from prmkit.scoring.rows import holds_runs, read_rows
from prmkit.trajectories.importing import FileReport, read_runs, warn_of_losses
from tests.dataset.conftest import prompt_of, row_of

# --- one list of layouts, every command that reads them ------------------------------------------------------------


class Found(NamedTuple):
    """What a command read from a file."""

    kept: dict[str, int]
    """Task -> the number of its line or item."""
    rejected: list[int]
    """Numbers of lines or items."""


def converted(path: Path) -> Found:
    output = path.parent / "data"
    convert(Settings((str(path),), output, split=Split(0.0), max_rejected="100%"))
    traced = read_jsonl(output / "reward_model_full.meta.jsonl")
    kept = {row["metadata"]["task_id"]: row["line"] for row in traced}
    return Found(kept, [entry["line"] for entry in read_jsonl(output / "rejected.jsonl")])


def to_be_scored(path: Path) -> Found:
    assert not holds_runs(str(path))
    with open_lines(str(path)) as lines:
        rows = list(read_rows(lines, ShapeOf((), {})))
    kept = {str(row.task): row.number for row in rows if row.request}
    return Found(kept, [row.number for row in rows if row.request is None])


def imported(path: Path) -> Found:
    reports: list[FileReport] = []
    kept = {run.task_id: run.source["line"] for run in read_runs([path], reports=reports)}
    assert holds_runs(str(path))
    return Found(kept, sorted(number for places in reports[0].examples.values() for number in places))


def a_row(task: str) -> dict[str, Any]:
    return row_of(prompt_of(f'{task} ä € ] }} " {{ [ ,\n'), task=task)


def a_run(task: str) -> dict[str, Any]:
    said = [{"role": "user", "content": "Go. ä €"}, {"role": "assistant", "content": 'Done ] } " { [ ,\n'}]
    return {"task_id": task, "messages": said}


COMMANDS = {"conversion": (converted, a_row), "scoring": (to_be_scored, a_row), "import": (imported, a_run)}


def text(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def lines(values: Sequence[Any]) -> str:
    return "\n".join(map(text, values)) + "\n"


def spread(values: Sequence[Any], indent: int = 2) -> str:
    return "\n".join(text(value, indent) for value in values) + "\n"


def long(value: Any, size: int) -> Any:
    """The value with a first message of that many characters."""
    turn = (value.get("conversations") or value["messages"])[0]
    key = "value" if "value" in turn else "content"
    turn[key] = "word " * (size // 5) + turn[key]
    return value


def with_nan(value: Any) -> Any:
    return value | {"x": float("nan")}


def found(numbers: Sequence[int] = (1, 2, 3), rejected: Sequence[int] = (), first: int = 1) -> Found:
    return Found({f"t{place}": number for place, number in enumerate(numbers, start=first)}, list(rejected))


Make = Callable[[list[Any]], str | bytes]
LAYOUTS: dict[str, tuple[Make, Found]] = {
    # One value per line; what is wrong with one line spoils no other.
    "lines": (lines, found()),
    "lines, the last one without its end": (lambda all: lines(all)[:-1], found()),
    "lines of Windows": (lambda all: lines(all).replace("\n", "\r\n"), found()),
    "lines of an old Mac": (lambda all: lines(all).replace("\n", "\r"), found()),
    "empty lines": (lambda all: "\n \n" + lines(all).replace("\n", "\n\n"), found((3, 5, 7))),
    "byte order mark": (lambda all: codecs.BOM_UTF8 + lines(all).encode(), found()),
    "byte order mark in line 3": (
        lambda all: lines(all[:2]).encode() + codecs.BOM_UTF8 + lines(all[2:]).encode(),
        found((1, 2), [3]),
    ),
    "the last line is cut off": (lambda all: lines(all)[:-9], found((1, 2), [3])),
    "the first line is cut off": (lambda all: lines(all)[9:], found((2, 3), [1], first=2)),
    "the first line has no end": (lambda all: '{"a": "cut\n' + lines(all), found((2, 3, 4), [1])),
    "the first line is {": (lambda all: "{\n" + lines(all), found((2, 3, 4), [1])),
    "the first line is [": (lambda all: "[\n" + lines(all), found((2, 3, 4), [1])),
    "the first line is an array": (lambda all: "[1, 2]\n" + lines(all), found((2, 3, 4), [1])),
    "the first line is a message": (lambda all: "INFO\n" + lines(all), found((2, 3, 4), [1])),
    "the first line is a message in brackets": (lambda all: "[INFO] a\n" + lines(all), found((2, 3, 4), [1])),
    "two bad lines first": (lambda all: "{oops\n{oops\n" + lines(all), found((3, 4, 5), [1, 2])),
    "text after the first line": (lambda all: text(all[0]) + " x\n" + lines(all[1:]), found((2, 3), [1], first=2)),
    "two objects in line 2": (
        lambda all: lines(all[:1]) + text(all[1]) + text(all[2]) + "\n", found((1,), [2]),
    ),
    "not UTF-8 in line 2": (
        lambda all: lines(all[:1]).encode() + lines(all[1:]).encode().replace("ä".encode(), b"\xe4", 1),
        Found({"t1": 1, "t3": 3}, [2]),
    ),
    "NUL bytes in line 2": (lambda all: lines(all[:1]) + "\0" * 99 + "\n" + lines(all[1:]), found((1, 3, 4), [2])),
    "NaN": (lambda all: lines([with_nan(all[0]), *all[1:]]), found()),
    "NaN in line 1, line 2 is damaged": (
        lambda all: lines([with_nan(all[0])]) + "{oops\n" + lines(all[1:]), found((1, 3, 4), [2]),
    ),
    "nested too deeply in line 2": (
        lambda all: lines(all[:1]) + '{"a":' * 3_000 + "1" + "}" * 3_000 + "\n" + lines(all[1:]),
        found((1, 3, 4), [2]),
    ),
    # One array.
    "array": (text, found()),
    "array and space": (lambda all: text(all) + "\n\n ", found()),
    "array over many lines": (lambda all: "\n" + text(all, 2), found()),
    "array without indentation": (lambda all: text(all, 0), found()),
    "array, an item a line": (lambda all: "[\n" + ",\n".join(map(text, all)) + "\n]\n", found()),
    "array, commas first": (lambda all: "[" + "\n,".join(map(text, all)) + "\n]", found()),
    "array with a last comma": (lambda all: "[" + ",\n".join(map(text, all)) + ",\n]", found()),
    "array with null": (lambda all: text([None, all[0], 7, *all[1:]]), found((2, 4, 5), [1, 3])),
    "array with null over many lines": (lambda all: text([None, all[0], 7, *all[1:]], 1), found((2, 4, 5), [1, 3])),
    # Objects one after another.
    "objects over many lines": (spread, found()),
    "objects without indentation": (lambda all: spread(all, 0), found()),
    "objects of Windows": (lambda all: codecs.BOM_UTF8 + spread(all).replace("\n", "\r\n").encode(), found()),
    "objects over many lines, then lines": (lambda all: spread(all[:1]) + lines(all[1:]), found()),
    "objects in one line": (lambda all: "".join(map(text, all)), found()),
    "objects and spaces in one line": (lambda all: " ".join(map(text, all)) + "\n", found()),
    "two objects in line 1": (lambda all: text(all[0]) + text(all[1]) + "\n" + lines(all[2:]), found()),
    "commas": (lambda all: ",\n".join(map(text, all)), found()),
    "two objects and a comma": (lambda all: ",\n".join(map(text, all[:2])), found((1, 2))),
    "commas, also the last": (lambda all: ",\n".join(map(text, all)) + ",\n", found()),
    "NaN in one line": (lambda all: text(with_nan(all[0])) + text(all[1]), found((1, 2))),
}  # fmt: skip


def written(path: Path, content: Make, make: Callable[[str], Any]) -> Path:
    """Write three values in a layout."""
    layout = content([make(f"t{number}") for number in (1, 2, 3)])
    path.write_bytes(layout.encode() if isinstance(layout, str) else layout)
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_command_finds_the_same(tmp_path: Path, layout: str, command: str) -> None:
    read, make = COMMANDS[command]
    content, expected = LAYOUTS[layout]
    for name in ("input.jsonl", "input.json"):
        assert read(written(tmp_path / name, content, make)) == expected


def swapped(layout: str, task: str) -> str:
    """The layout without the colon after the id of a task."""
    return layout.replace(f'"task_id": "{task}"', f'"task_id" "{task}"')


REFUSED: dict[str, tuple[Make, str]] = {
    "array without its end": (lambda all: "[\n" + ",\n".join(map(text, all)) + ",\n", "damaged after item 3"),
    "array that is cut off": (lambda all: text(all)[:-9], "damaged after item 2"),
    "array that is damaged": (lambda all: swapped(text(all), "t2"), "damaged after item 1"),
    "array over many lines that is damaged": (lambda all: swapped(text(all, 1), "t1"), "damaged after item 0"),
    "array and more": (lambda all: text(all[:2], 1) + "\n" + lines(all[2:]), "damaged after item 2"),
    "objects that are cut off": (lambda all: spread(all)[:-9], "damaged after item 2"),
    "object that is cut off": (lambda all: spread(all[:1])[:50], "damaged after item 0"),
    "objects that are damaged": (lambda all: swapped(spread(all), "t3"), "damaged after item 2"),
    "the first object is damaged": (lambda all: swapped(spread(all), "t1"), "damaged after item 0"),
    "an object around lines, cut off": (
        lambda all: '{"data": [\n' + ",\n".join(map(text, all)) + "\n", "damaged after item 0"
    ),
    "two objects in line 1, then damage": (
        lambda all: text(all[0]) + text(all[1]) + "\n{oops\n" + lines(all[2:]), "damaged after item 2"
    ),
    "an array that is not UTF-8": (lambda all: text(all).encode().replace("ä".encode(), b"\xe4"), "not UTF-8, after"),
    "objects that are not UTF-8": (lambda all: spread(all).encode("latin-1", "replace"), "not UTF-8, after item 0"),
    "UTF-16": (lambda all: lines(all).encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "UTF-16LE": (lambda all: lines(all).encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    "UTF-16BE": (lambda all: text(all).encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
    "UTF-32": (lambda all: lines(all).encode("utf-32"), "iconv -f UTF-32 -t UTF-8"),
    "NUL bytes first": (lambda all: "\0" * 99 + "\n" + lines(all), "a binary file, not JSON"),
    "program": (lambda all: b"\x7fELF\0\1", "a binary file, not JSON"),
    "Parquet": (lambda all: b"PAR1\x15\0", "a Parquet file.*read_parquet"),
    "Arrow": (lambda all: b"ARROW1\0\0", "an Arrow file"),
    "zip": (lambda all: b"PK\x03\x04\0", "a zip archive or a spreadsheet.*inspect log convert"),
    "SQLite": (lambda all: b"SQLite format 3\0", "an SQLite database"),
    "gzip": (lambda all: gzip.compress(b"{}", mtime=0), r"compressed with gzip. Give it a name that ends in \.gz"),
    "nested too deeply": (
        lambda all: spread(all[:1]) + '{"a":\n' * 99_000 + "1" + "}" * 99_000, "nested too deeply, after item 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("layout", REFUSED)
def test_every_command_refuses_the_same(tmp_path: Path, layout: str, command: str) -> None:
    read, make = COMMANDS[command]
    content, message = REFUSED[layout]
    path = written(tmp_path / "input.jsonl", content, make)
    with pytest.raises(DataError, match=rf"input\.jsonl: .*{message}"):
        read(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_name_has_to_begin_with_json(tmp_path: Path, command: str) -> None:
    read, make = COMMANDS[command]
    for name, content, message in (
        ("notes.txt", "# Notes\n", "not JSON"),
        ("rows.csv", "prompt,answer\na,b\n", r"a table.*read_csv\('.*rows.csv'\)"),
        ("rows.tsv.bz2", "prompt\tanswer\na\tb\n", r"a table.*read_csv\('.*rows.tsv.bz2', sep"),
    ):
        path = tmp_path / name
        path.write_bytes(bz2.compress(content.encode()) if name.endswith(".bz2") else content.encode())
        with pytest.raises(DataError, match=rf"{name}: {message}"):
            read(path)
        path = path.with_suffix("") if name.endswith(".bz2") else path
        path.write_text(lines([make("t1")]))
        assert read(path) == found((1,))


BIG = 5 << 18  # more than is read at a time


@pytest.mark.parametrize(
    ("layout", "place"),
    [(lines, 0), (lines, 1), (text, 0), (text, 1), (lambda all: text(all, 1), 0), (spread, 0), (spread, 1),
     (lambda all: "".join(map(text, all)), 1)],
)  # fmt: skip
def test_a_long_row_is_rejected_and_a_long_run_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Callable[[list[Any]], str], place: int
) -> None:
    monkeypatch.setattr("prmkit.layouts.LONGEST_LINE", 1 << 20)
    path = tmp_path / "input.jsonl"
    for command, (read, make) in COMMANDS.items():
        values = [make(f"t{number}") for number in (1, 2, 3)]
        long(values[place], BIG)
        path.write_text(layout(values))
        kept = {f"t{number}": number for number in (1, 2, 3) if command == "import" or number != place + 1}
        assert read(path) == Found(kept, [] if command == "import" else [place + 1])


def test_a_row_that_is_too_long_to_find_its_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "input.json"
    path.write_text(spread([long(a_row("t1"), 20 << 20), a_row("t2")]))
    with pytest.raises(DataError, match=r"an item of more than 8,388,608 bytes, after item 0"):
        to_be_scored(path)


def test_a_run_longer_than_what_shows_the_layout_is_read(tmp_path: Path) -> None:
    """Its first messages look like lines."""
    first, second = long(a_run("t1"), 9 << 20)["messages"]
    for messages in ((first, second), (second, first, second), (second | {"role": "user"}, first, second)):
        path = tmp_path / "input.json"
        path.write_text('{"task_id": "t1", "messages": [\n' + ",\n".join(map(text, messages)) + "\n]}\n")
        assert imported(path) == found((1,))


def test_damage_is_refused_without_reading_the_rest() -> None:
    stream = io.BytesIO(b"[{}, {oops}, " + b'{"a": "word"},' * 2_000_000)
    with pytest.raises(DataError, match="damaged after item 1"):
        list(read_lines(stream, "input.json", ANY_LENGTH))
    assert stream.tell() < 9 << 20 < len(stream.getvalue())


def test_a_number_says_whether_it_is_of_a_line_or_of_an_item(tmp_path: Path, narrated: Narrated) -> None:
    path = tmp_path / "input.json"
    for content, unit in (('{"prompt": ""}\n{}\n', "line"), ('[{"prompt": ""}, {}]', "item")):
        path.write_text(content)
        with open_lines(str(path)) as found_lines:
            reasons = [row.reason or "" for row in read_rows(found_lines, ShapeOf((), {}))]
        assert [reason.split(":")[0] for reason in reasons] == [f"{unit} 1", f"{unit} 2"]
    for content, place in ((text([a_run("t1"), None]), "(item 2)"), (lines([a_run("t1"), None]), "(line 2)")):
        path.write_text(content)
        reports: list[FileReport] = []
        list(read_runs([path], reports=reports))
        warn_of_losses(reports)
        assert narrated.text.splitlines()[-1].endswith(place)


def test_a_file_without_runs_says_what_is_wrong_with_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    for content, message in (
        ("", r"contains no JSON\."), ("[]\n", r"contains no JSON\."), ("[\n\n]\n", r"contains no JSON\."),
        ("{'a': 1}\n{'a': 2}\n", r"contains no JSON; line 1: not JSON \(unexpected"),
        (text(a_run("t"))[:-9], "contains no JSON; line 1: not JSON"), ("null\n", "unknown format of runs"),
        ("oops\nnull\n", "unknown format of runs"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(DataError, match=rf"input\.jsonl: {message}"):
            list(read_runs([path]))


def test_agents_may_leave_characters_that_rows_may_not(tmp_path: Path) -> None:
    """A bare tab, and half of an emoji: in a run they harm nothing, but a prompt would not be what the judge saw."""
    for name, layout in (("lines.jsonl", lines), ("array.json", lambda all: text(all, 1))):
        for harm in ("\t", "\\ud83d"):
            path = tmp_path / name
            path.write_text(layout([a_run("t1"), a_run("t2")]).replace("Go.", f"Go{harm}."))
            tasks = [run.task for run in read_runs([path])]
            assert tasks == ["Go\t. ä €" if harm == "\t" else "Go?. ä €"] * 2
            path.write_text(layout([a_row("t1"), a_row("t2")]).replace("t2 ", f"t2{harm}"))
            for read in (converted, to_be_scored):
                assert read(path) == found((1,), [2])


@pytest.mark.parametrize("read", [converted, to_be_scored])
def test_rows_from_a_pipe_are_read_whole(tmp_path: Path, read: Callable[[Path], Found]) -> None:
    """What was looked at in a pipe is gone, so nothing looks into it first."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    results: list[Found] = []
    reader = Thread(target=lambda: results.append(read(pipe)), daemon=True)
    reader.start()
    pipe.write_text(lines([a_row("t1"), a_row("t2")]))
    reader.join(20)
    assert results == [found((1, 2))]


def test_runs_from_a_pipe_are_refused(tmp_path: Path) -> None:
    """Their form is recognised first and then they are read: the first runs would be lost."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: a pipe or device.*Use a file"):
        list(read_runs([tmp_path / "pipe"]))


# --- what is found in a file -----------------------------------------------------------------------------------------


def numbers(path: Path, content: bytes | str) -> list[tuple[int, Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with open_lines(str(path)) as lines:
        return [(line.number, parse_line(line)["n"]) for line in lines]


OBJECTS = [{"n": number, "text": 'a ] } " { [ ,\n'} for number in range(1, 6)]
ALL = [(number, number) for number in range(1, 6)]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, OBJECTS)),
        json.dumps(OBJECTS),
        json.dumps(OBJECTS) + "\n\n",
        "\n " + json.dumps(OBJECTS, indent=2),
        "[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]\n",
        "[" + ",\n".join(map(json.dumps, OBJECTS)) + ",\n]",
        ",\n".join(map(json.dumps, OBJECTS)),
        "\n".join(json.dumps(value, indent=4) for value in OBJECTS),
        "\ufeff" + "\r\n".join(json.dumps(value, indent=1) for value in OBJECTS),
    ],
    ids=["lines", "array", "array and space", "pretty", "by line", "extra comma", "commas", "objects", "Windows"],
)
def test_rows_are_found_in_any_layout(tmp_path: Path, content: str) -> None:
    for name in ("rows.jsonl", "rows.json", "rows.ndjson"):
        assert numbers(tmp_path / name, content) == ALL


def test_layouts_are_read_across_the_parts_in_which_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [{"n": number, "text": "ä€\N{GRINNING FACE}" * 50} for number in range(1, 40)]
    monkeypatch.setattr("prmkit.layouts.LONGEST_LINE", 1_000)
    for text in (json.dumps(many, ensure_ascii=False), json.dumps(many, indent=1, ensure_ascii=False)):
        assert numbers(tmp_path / "rows.json", text) == [(number, number) for number in range(1, 40)]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_files_are_recognised_by_their_name(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    assert numbers(tmp_path / f"rows.JSONL{suffix}", pack(json.dumps(OBJECTS).encode())) == ALL


@pytest.mark.parametrize("first", ["[1, 2]", "[]", "[{}]", "{oops", '{"n": ', "[", '{"a": "cut'])
def test_a_bad_first_line_spoils_no_other(tmp_path: Path, first: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([first, *map(json.dumps, OBJECTS)]))
    with open_lines(str(path)) as lines:
        found = list(lines)
    assert [line.number for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[0].text.decode() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(OBJECTS)[:-30], "after item 4"),
        (json.dumps(OBJECTS).replace('"n": 3', '"n" 3'), "after item 2"),
        (b'{\n"prompt": "caf\xe9"}\n', "not UTF-8, after item 0"),
        (b'[\n{"prompt": "caf\xe9"}\n]\n', "not UTF-8, after item 0"),
        (json.dumps(OBJECTS).encode("utf-16"), "UTF-16.*iconv"),
        (gzip.compress(b"{}", mtime=0), r"gzip.*ends in \.gz"),
        (b"PAR1....", "Parquet"),
        (b"PK\x03\x04....", "zip"),
    ],
)
def test_a_file_that_is_not_rows_is_named_with_the_way_out(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        numbers(tmp_path / "rows.json", content)
    with pytest.raises(DataError, match=r"rows\.csv: a table.*read_csv"):
        numbers(tmp_path / "rows.csv", "prompt,answer\na,b\n")


UNDAMAGED = ["\n".join(map(json.dumps, OBJECTS)), json.dumps(OBJECTS), json.dumps(OBJECTS, indent=1)]
HARM = [
    b"\xe9", b"\xff", b"\xf0\x9f", b"\0", b"\xef\xbb\xbf", b"[", b"}", b",", b'"', b"\\ud800", b"\n",
    b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"NaN", b"\x1e",
]  # fmt: skip


@given(
    st.sampled_from(UNDAMAGED),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 30), st.sampled_from(HARM)), min_size=1, max_size=3),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_its_lines_are(
    tmp_path: Path, layout: str, harm: list[tuple[int, int, bytes]]
) -> None:
    content = layout.encode()
    for place, lost, put in harm:
        content = content[:place] + put + content[place + lost :]
    (tmp_path / "rows.json").write_bytes(content)
    with suppress(DataError), open_lines(str(tmp_path / "rows.json")) as lines:
        for line in lines:
            with suppress(Rejected):
                read_row(parse_line(line), line)
