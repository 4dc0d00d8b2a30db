"""Text with a unit becomes a number once, and goes back to text without loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from orchestrator.spec.units import Duration, Memory, WallTime


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * 1024**3),
        ("512M", 512 * 1024**2),
        ("1.5T", 3 * 1024**4 // 2),
        ("64GB", 64 * 1024**3),
        ("64GiB", 64 * 1024**3),
        ("10 k", 10240),
        ("7B", 7),
        (" 2g ", 2 * 1024**3),
        ("2048", None),
    ],
)
def test_memory(text: str, size: int | None) -> None:
    if size is None:  # bytes? mebibytes, as Slurm would read it? nobody can tell
        with pytest.raises(ValueError, match="2048"):
            Memory.parse(text)
    else:
        assert Memory.parse(text) == size


@pytest.mark.parametrize("text", ["", "G", "2 apples", "-1G", "1e3M", "2P", "1.G", "٢G", "2G\n3G", "9" * 40 + "T"])
def test_memory_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"K, M, G, T"):
        Memory.parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("04:00:00", 4 * 3600),
        ("4:00:00", 4 * 3600),
        ("100:00:00", 100 * 3600),
        ("30:00", 1800),  # Slurm: minutes:seconds
        ("90:00", 5400),
        ("2-12:00:00", 2 * 86400 + 12 * 3600),
        ("2-12", 2 * 86400 + 12 * 3600),
        ("2-12:30", 2 * 86400 + 12 * 3600 + 1800),
        ("4h", 4 * 3600),
        ("90m", 5400),
        ("1h30m", 5400),
        ("1d", 86400),
    ],
)
def test_wall_time(text: str, seconds: int) -> None:
    assert WallTime.parse(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "1:2:3:4", "00:00:61", "01:75:00", "1-25:00:00", "UNLIMITED", "-1h", "4 hours", "1:", "m1h"]
)
def test_wall_time_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        WallTime.parse(text)


@pytest.mark.parametrize(("text", "seconds"), [("120s", 120), ("2m", 120), ("1h30m", 5400), ("0s", 0)])
def test_duration(text: str, seconds: int) -> None:
    assert Duration.parse(text) == seconds


@pytest.mark.parametrize("text", ["", "120", "2:00", "1.5h", "s", "5m5m"])
def test_duration_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        Duration.parse(text)


@given(st.integers(0, 2**53))
def test_text_and_back(number: int) -> None:
    for unit in (Memory, WallTime, Duration):
        value = unit(number)
        assert unit.parse(str(value)) == value


@given(st.text())
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for unit in (Memory, WallTime, Duration):
        try:
            assert unit.parse(text) >= 0
        except ValueError:
            continue


@pytest.mark.parametrize("value", [1, 1.5, True, None, [], {}])
def test_only_text_with_a_unit(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Memory).validate_python(value)
    assert TypeAdapter(Memory).validate_python(Memory(5)) == 5
