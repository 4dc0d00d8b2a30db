"""YAML 1.2 scalars, the place of everything, and files that are not what they should be."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.spec.problems import Place
from orchestrator.spec.reader import MAX_BYTES, parse_yaml, read_yaml


def value_of(text: str) -> Any:
    return parse_yaml(text, "f.yaml").value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("4:00:00", "4:00:00"),
        ("2020-01-01", "2020-01-01"),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("-12", -12),
        ("~", None),
        ("", None),
        ("null", None),
        ("nuLL", "nuLL"),
        ("'5'", "5"),
        ('"true"', "true"),
        ("=", "="),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("1e", "1e"),
        ("é", "é"),
        ("٣", "٣"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("!!float 5", 5.0),
    ],
)
def test_scalar(text: str, value: object) -> None:
    given_value = value_of(f"a: {text}")["a"]
    assert given_value == value
    assert type(given_value) is type(value)


def test_nan() -> None:
    assert math.isnan(value_of("a: .nan")["a"])


def test_keys_are_text_as_written() -> None:
    assert value_of("on: 1\n1: 2\n1.50: 3\n~: 4\n") == {"on": 1, "1": 2, "1.50": 3, "~": 4}


def test_places() -> None:
    document = parse_yaml("a: 1\nb:\n  - {é: x, c: y}\n", "f.yaml")
    assert str(document.place(("a",))) == "f.yaml:1:4"
    assert str(document.place(("b", 0, "c"))) == "f.yaml:3:15"
    assert str(document.place(("b", 0, "c"), key=True)) == "f.yaml:3:12"
    assert str(document.place(("b", 0, "unknown"))) == "f.yaml:3:5"  # the nearest thing around it
    assert str(document.place(("unknown",), key=True)) == "f.yaml:1:1"


def test_anchors_and_merge_keys() -> None:
    text = "base: &b {x: 1, y: {z: 2}}\nother: &o {x: 5, w: 6}\nmerged: {<<: [*b, *o], x: 3}\nsame: *b\n"
    document = parse_yaml(text + "quoted: {'<<': 1}\n", "f.yaml")
    assert document.value["merged"] == {"x": 3, "y": {"z": 2}, "w": 6}
    assert document.value["same"] == {"x": 1, "y": {"z": 2}}
    assert document.value["quoted"] == {"<<": 1}
    assert str(document.place(("merged", "y", "z"))) == "f.yaml:1:24"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {<<: 5}", "takes a mapping"),
        ("[a]: 1", "a key must be text"),
        ("{a: 1}: 1", "a key must be text"),
        ("a: 1\na: 1", "given twice"),
        ('"\\0": 1', "NUL"),
        ("a: *b", "undefined alias"),
        ("a: !thing 1", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("a: !!int x", "tag"),
        ("a: !!timestamp 2020-01-01", "tag"),
        ("a: " + "9" * 5000, "too large a number"),
        ("a: '", "not valid YAML"),
        ("a: \x02", "control character"),
        ("&a [*a]", "too deeply nested"),
        ("&a {b: *a}", "too deeply nested"),
        ("&a {<<: *a}", "too deeply nested"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith("f.yaml:")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "- " * 100_000, "{a: " * 50_000, "a: " + "&x " * 10 + "b", "? " * 5000]
)
def test_deep_nesting_is_refused_not_crashed_on(text: str) -> None:
    with pytest.raises(SpecError):
        parse_yaml(text, "f.yaml")


def test_alias_bombs_cost_nothing() -> None:
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    merges = ["m0: &m0 {k: [x]}"] + [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    started = time.monotonic()
    for bomb in (lists, merges):
        with pytest.raises(SpecError, match="aliases"):
            parse_yaml("\n".join(bomb), "f.yaml")
    assert time.monotonic() - started < 10


def test_several_problems_are_one_error() -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml('a: 1\na: 2\nb: "\\0"\n', "f.yaml")
    assert [problem["line"] for problem in caught.value.problems] == [2, 3]


def test_fixed_place() -> None:
    with pytest.raises(SpecError, match=r"^--set x"):
        parse_yaml("[1", "", fixed=Place("--set x"))


# --- files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.yaml", "no such file"),
        (".", "is a directory"),
        ("missing/a.yaml", "no such file"),
        ("a\0b", "null byte"),
    ],
)
def test_no_file(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_yaml(tmp_path / name, what="the spec")


def test_file_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x: 1")
    with pytest.raises(SpecError, match="Not a directory"):
        read_yaml(tmp_path / "a" / "b", what="the spec")


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml(tmp_path / "a.yaml", what="the spec")


def test_endless_file() -> None:
    with pytest.raises(SpecError, match="is larger than 4 MiB"):
        read_yaml(Path("/dev/zero"), what="the spec")
    assert MAX_BYTES == 4 * 1024**2


@pytest.mark.parametrize(
    "data", [b"a: \xff", "a: é".encode("latin-1"), "a: b".encode("utf-16"), b"\xed\xa0\x80", bytes(range(64)) + b"\xff"]
)
def test_not_utf8(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(SpecError, match="UTF-8"):
        read_yaml(tmp_path / "a.yaml", what="the spec")


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("\ufeffa: 1\r\nb: é\r\n".encode())
    document = read_yaml(tmp_path / "a.yaml", what="the spec")
    assert document.value == {"a": 1, "b": "é"}
    assert str(document.place(("b",))).endswith("a.yaml:2:4")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_a_value_or_a_spec_error(text: str) -> None:
    try:
        parse_yaml(text, "f.yaml")
    except SpecError as error:
        assert error.problems


plain_text = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Zl", "Zp"], exclude_characters="\ufeff"))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.-_é ", max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_json_is_yaml(value: Any) -> None:
    """Every JSON text reads as the same value."""
    assert value_of(json.dumps(value, ensure_ascii=False)) == value
