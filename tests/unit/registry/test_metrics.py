"""metrics.csv: exact, append-only, and equal to that of a run that was never touched."""

from __future__ import annotations

import math
import os
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RegistryError
from orchestrator.registry import MetricsLog, iter_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def log_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.append(step, step // 10, {"train/loss": 1 / (step + 3), "lr": 1e-3 * step})
        if step % 10 == 9:
            log.append(step, step // 10, {"val/knn, top 1": step / 7})


def test_the_format(path: Path) -> None:
    with MetricsLog(path, resumed_step=None) as log:
        log.append(1, 0, {"loss": 0.1, "acc": 1, "flag": True})
        log.append(2, 0, {'a "b", c': math.nan, "carriage\rreturn": 1.0, "x": math.inf, "y": -math.inf})
        log.append(3, 1, {})
        assert log.rows == 7
    assert path.read_bytes().decode() == (
        "step,epoch,name,value\n"
        "1,0,loss,0.1\n1,0,acc,1.0\n1,0,flag,1.0\n"
        '2,0,"a ""b"", c",NaN\n2,0,"carriage\rreturn",1.0\n2,0,x,Infinity\n2,0,y,-Infinity\n'
    )


def test_a_run_interrupted_anywhere_ends_with_the_same_file(path: Path) -> None:
    with MetricsLog(path, resumed_step=None) as log:
        log_steps(log, 1, 40)
    untouched = path.read_bytes()
    path.unlink()
    with MetricsLog(path, resumed_step=None) as log:
        log_steps(log, 1, 12)
    with MetricsLog(path, resumed_step=None) as log:  # killed before the first checkpoint
        log_steps(log, 1, 25)
    with MetricsLog(path, resumed_step=19) as log:
        assert log.rows == 40
        log_steps(log, 20, 31)
    with MetricsLog(path, resumed_step=31) as log:  # saved on a signal: nothing is dropped
        log_steps(log, 32, 40)
    assert path.read_bytes() == untouched


def test_rows_of_the_checkpoints_own_step_that_came_after_it(path: Path) -> None:
    log = MetricsLog(path, resumed_step=None)
    log.append(10, 0, {"loss": 1.0})
    rows_in_checkpoint = log.rows
    log.append(10, 0, {"val": 2.0})  # validation at the same step, after the save
    log.close()
    with MetricsLog(path, resumed_step=10, keep_rows=rows_in_checkpoint) as log:
        log.append(10, 0, {"val": 2.0})
    assert [row.name for row in iter_metrics(path)] == ["loss", "val"]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_last_line_torn_by_a_kill_is_dropped(path: Path, cut: int) -> None:
    with MetricsLog(path, resumed_step=None) as log:
        log.append(1, 0, {"loss": 0.125, 'with\nnewline, and "quotes"': 0.5})
    whole = path.read_bytes()
    expected = list(iter_metrics(path))
    path.write_bytes(whole[:-cut])
    seen = list(iter_metrics(path))
    assert seen == expected[: len(seen)]
    assert len(seen) < 2
    with MetricsLog(path, resumed_step=1) as log:
        assert log.rows == len(seen)
        log.append(2, 0, {"loss": 0.5})
    assert list(iter_metrics(path)) == [*seen, (2, 0, "loss", 0.5)]


ROW = st.tuples(st.integers(0, 50), st.text(st.characters(codec="utf-8")), st.floats(allow_nan=False))


@given(st.lists(ROW, max_size=20), st.integers(0, 50))
def test_every_name_and_number_reads_back(rows: list[tuple[int, str, float]], resumed: int) -> None:
    path = Path(f"/tmp/orch-test-metrics-{os.getpid()}.csv")
    try:
        with MetricsLog(path, resumed_step=None) as log:
            for step, name, value in rows:
                log.append(step, 3, {name: value})
        assert [(r.step, r.name, r.value) for r in iter_metrics(path)] == rows
        MetricsLog(path, resumed_step=resumed).close()
        assert [(r.step, r.name, r.value) for r in iter_metrics(path)] == [r for r in rows if r[0] <= resumed]
    finally:
        path.unlink(missing_ok=True)


def test_a_reader_never_sees_half_a_truncation(path: Path) -> None:
    with MetricsLog(path, resumed_step=None) as log:
        log_steps(log, 1, 100)
    with path.open() as reader:  # opened before, goes on reading the file it has
        MetricsLog(path, resumed_step=5).close()
        assert len(reader.readlines()) == 1 + 210


def test_an_older_attempts_late_rows_go_nowhere(path: Path) -> None:
    old = MetricsLog(path, resumed_step=None)
    old.append(1, 0, {"loss": 1.0})
    with MetricsLog(path, resumed_step=1) as new:
        old.append(2, 0, {"loss": 666.0})
        new.append(2, 0, {"loss": 2.0})
    old.close()
    assert [row.value for row in iter_metrics(path)] == [1.0, 2.0]


@pytest.mark.parametrize("content", [b"", b"step,ep"])
def test_killed_before_the_header_was_complete(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert list(iter_metrics(path)) == []
    with MetricsLog(path, resumed_step=3) as log:
        assert log.rows == 0
    assert path.read_text() == "step,epoch,name,value\n"


@pytest.mark.parametrize("content", ["epoch,loss\n1,2\n", "step,epoch,name,value\n1,0,a\n2,0,b,1.0\n"])
def test_what_is_not_ours_or_has_holes_is_left_alone(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(RegistryError, match=r"metrics\.csv"):
        MetricsLog(path, resumed_step=3)
    assert path.read_text() == content
    assert [p.name for p in path.parent.iterdir()] == ["metrics.csv"]


def test_bytes_after_a_power_cut(path: Path) -> None:
    with MetricsLog(path, resumed_step=None) as log:
        log.append(1, 0, {"loss": 0.5})
    with path.open("ab") as handle:
        handle.write(b"\0" * 4096)  # the length reached the disk, the content did not
    assert [row.value for row in iter_metrics(path)] == [0.5]
    with MetricsLog(path, resumed_step=1) as log:
        assert log.rows == 1


def test_a_row_that_does_not_fit_is_not_half_written(path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # the limit is for this process only
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            log = MetricsLog(path, resumed_step=None)
            log.append(1, 0, {"loss": 0.5})
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
            try:
                log.append(2, 0, {"a very long name for so little room on the disk": 0.5})
            except RegistryError:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_text() == "step,epoch,name,value\n1,0,loss,0.5\n"


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError) as caught:
        MetricsLog(tmp_path / "file" / "metrics.csv", resumed_step=None)
    assert caught.value.hint
