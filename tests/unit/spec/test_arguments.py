"""`job.args` on a command line: nothing is lost, and plain text needs no quotes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec import parse_argument, parse_spec, program_args, render_argument

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
looks_like_json = st.sampled_from(
    [
        *("1", "-0", "1.0", "1e3", "true", "null", "NaN", "-Infinity", '"a"', "[1]", "{}", " 1", "1\n", "\ufeff1"),
        *("[" * 3000, "9" * 5000, '"', "[", "--x", ""),
    ]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
    | looks_like_json,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def typed(value: Any) -> Any:
    """Distinguishes 1, 1.0 and True, which are equal in Python."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value).__name__, repr(value)


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,10}", fullmatch=True), values, max_size=4))
def test_any_value_arrives(args: dict[str, Any]) -> None:
    spec = parse_spec({"name": "x", "job": {"module": "m", "args": args}}, environ={})
    words = program_args(spec.job)
    pairs = [word.removeprefix("--").partition("=") for word in words]
    assert typed({key: parse_argument(rest) for key, _, rest in pairs}) == typed(args)
    assert [key for key, _, _ in pairs] == list(args)  # in the order given


@given(text | looks_like_json)
def test_text_is_verbatim_unless_it_would_parse_as_json(value: str) -> None:
    rendered = render_argument(value)
    try:
        json.loads(value)
    except json.JSONDecodeError:
        assert rendered == value
    except (ValueError, RecursionError):
        assert json.loads(rendered) == value
    else:
        assert json.loads(rendered) == value


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("/data/digits", "/data/digits"),
        ("a b; $(x) `y` \"z\" 'q'\n#é", "a b; $(x) `y` \"z\" 'q'\n#é"),
        (4, "4"),
        (0.001, "0.001"),
        (1e-5, "1e-05"),
        (True, "true"),
        (None, "null"),
        ("4", '"4"'),
        ("true", '"true"'),
        ("True", "True"),
        ("", ""),
        ([1, "é"], '[1,"é"]'),
        ({"a": {"b": None}}, '{"a":{"b":null}}'),
    ],
)
def test_words(value: Any, word: str) -> None:
    assert render_argument(value) == word


def test_argv_follows_unchanged() -> None:
    spec = parse_spec(
        {"name": "x", "job": {"command": ["prog", ""], "args": {"a": 1}, "argv": ["--b", "", "1"]}}, environ={}
    )
    assert program_args(spec.job) == ["--a=1", "--b", "", "1"]
