"""Files that others read while they are written."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import RegistryError
from orchestrator.files import append_line, float_word, fsync_dir, open_atomic, read_json, write_atomic, write_json


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_replaces_the_content_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.json"]


def test_mode_is_that_of_the_new_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "secrets.json", b"{}", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("operation", ["create", "fsync", "rename"])
def test_a_failure_before_the_rename_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, operation: str
) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def fail(op: str) -> None:
        if op == operation:
            raise OSError(errno.EIO, "injected")

    with pytest.raises(OSError, match="injected"), open_atomic(path, trace=fail) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_exception_in_the_block_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")
    with pytest.raises(ZeroDivisionError), open_atomic(path) as handle:
        handle.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_reader_polling_at_full_speed_sees_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    write_json(path, {"n": 0, "pad": "x" * 50_000})
    done = threading.Event()

    def poll() -> set[int]:
        seen = set()
        while not done.is_set():
            value = read_json(path)
            assert len(value["pad"]) == 50_000
            seen.add(value["n"])
        return seen

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(poll) for _ in range(2)]
        for n in range(1, 60):
            write_json(path, {"n": n, "pad": "x" * 50_000})
        done.set()
    assert all(len(reader.result()) > 1 for reader in readers)


def test_json_without_nan_but_with_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"z": 1, "a": [math.nan, {"b": -math.inf}, (math.inf, 0.1)], "text": "é\n\"'`$(x)\u2028"})
    text = path.read_text()
    assert read_json(path) == {"z": 1, "a": ["NaN", {"b": "-Infinity"}, ["Infinity", 0.1]], "text": "é\n\"'`$(x)\u2028"}
    assert text.index('"z"') < text.index('"a"')  # the order of the writer
    json.loads(text, parse_constant=pytest.fail)


def test_json_takes_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {"name": name})
    assert os.fsencode(read_json(tmp_path / "a.json")["name"]) == b"caf\xe9"


def test_json_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path, "x": math.nan})
    assert names(tmp_path) == []


def test_read_json_says_which_file_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"half":')
    with pytest.raises(RegistryError, match=r"a\.json is not valid JSON"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RegistryError):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing")


def test_appended_lines_survive_a_torn_one_before_them(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"n": 1})
    with path.open("ab") as handle:
        handle.write(b'{"n": 2, "torn')
    append_line(path, {"n": 3})
    append_line(path, {"n": 4})
    lines = path.read_text().splitlines()
    assert [lines[0], *lines[2:]] == ['{"n": 1}', '{"n": 3}', '{"n": 4}']


def test_two_appending_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    threads = [
        threading.Thread(
            target=lambda w=w: [append_line(path, {"writer": w, "n": n, "pad": "x" * 500}) for n in range(200)]
        )
        for w in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert [[e["n"] for e in events if e["writer"] == w] for w in range(3)] == [list(range(200))] * 3


def test_fsync_dir_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fsync_dir(tmp_path)
    with pytest.raises(NotADirectoryError):
        fsync_dir(tmp_path / "file")


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-308, 5e-324, -0.0, 3.0, 1e22])
def test_float_words_read_back_exactly(value: float) -> None:
    assert float(float_word(value)).hex() == value.hex()


def test_float_words_of_what_is_not_finite() -> None:
    assert [float_word(v) for v in (math.nan, math.inf, -math.inf)] == ["NaN", "Infinity", "-Infinity"]
