"""The table of stops in docs/preemption.md shows what was measured, and every row of the tests was."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.cluster.test_stops import STOPS

DOCS = Path(__file__).parents[2] / "docs"
RELEASES = ("22.05", "24.11")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_stop_table", DOCS / "generate_stop_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DOCS / "stops.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_page_has_not_drifted(generator: ModuleType) -> None:
    page = (DOCS / "preemption.md").read_text(encoding="utf-8")
    assert generator.BEGIN + generator.table() + generator.END in page, "run: python docs/generate_stop_table.py"


def test_every_row_was_measured_on_both_releases(rows: list[dict[str, Any]]) -> None:
    measured = {(row["stop"], row["runtime"], row["slurm"]) for row in rows if not row.get("plain")}
    wanted = {(stop.name, runtime, release) for stop in STOPS for runtime in stop.runtimes for release in RELEASES}
    assert wanted == measured, "run: make stop-table"


def test_what_was_measured_is_what_the_tests_demand(rows: list[dict[str, Any]]) -> None:
    stops = {stop.name: stop for stop in STOPS}
    for row in rows:
        if not row.get("plain"):
            stop = stops[row["stop"]]
            assert row["state"] == stop.state
            assert row["lost"] <= stop.lost
            assert tuple(row["reasons"][: len(stop.reasons)]) == stop.reasons


def test_plain_lightning_was_stopped_in_the_same_ways(rows: list[dict[str, Any]]) -> None:
    plain = {row["stop"] for row in rows if row.get("plain")}
    assert len(plain) >= 12
    assert plain <= {stop.name for stop in STOPS}
