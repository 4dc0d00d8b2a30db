"""`shell` and `top` as far as no cluster is needed: where a rank is, how samples of nodes become one look."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator import operations
from orchestrator.cli.view import usage_lines
from orchestrator.errors import BackendError
from orchestrator.files import read_json, write_json
from orchestrator.operations.results import GpuUse
from orchestrator.registry import EventLog
from tests.unit.operations.conftest import World


def rank(node: str, number: int | None, **fields: Any) -> dict[str, Any]:
    line = {"kind": "rank", "node": node, "rank": number, "pid": 7, "processes": 3, "cpu_percent": 150.0}
    return {**line, "rss_bytes": 2_000_000_000, "gpus": [], **fields}


def end(node: str) -> dict[str, Any]:
    return {"kind": "end", "node": node, "ranks": 1, "time": 1.0}


def streaming(world: World, *lines: Any, then: str = "sys.stdin.read()") -> None:
    """The step beside the job prints these lines and goes on until it is let go of."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    program = f"import sys; sys.stdout.write({text!r}); sys.stdout.flush(); {then}"
    world.backend.step = (sys.executable, "-c", program)


def on_two_nodes(world: World) -> str:
    run, agent = world.running()
    agent.rows[-1]["nodes"] = ["n1", "n2"]
    agent._write("running", None, None)
    return run


def look(world: World, run: str) -> Any:
    with closing(operations.top(str(world.paths(run).run_dir), open_backend=world.backend.open)) as looks:
        return next(looks)


def test_a_look_has_the_ranks_of_all_nodes_in_order(world: World) -> None:
    run = on_two_nodes(world)
    gpu = {"index": 1, "percent": 97, "bytes": 30_000_000_000}
    streaming(world, "Welcome to the cluster!", rank("n2", 0), end("n2"), rank("n1", 1, gpus=[gpu]), end("n1"))
    usage = look(world, run)
    assert [(use.rank, use.node) for use in usage.ranks] == [(0, "n2"), (1, "n1")]
    assert usage.ranks[1].gpus == (GpuUse(1, 97, 30_000_000_000),)
    assert usage.silent == ()
    text = ["".join(part for part, _ in line) for line in usage_lines(usage)]
    assert text[2].split() == ["0", "n2", "7", "3", "150", "%", "2.0", "GB"]
    assert text[3].endswith("1: 97 %, 30.0 GB")
    (nodes, argv), *_ = world.backend.steps
    assert nodes == ("n1", "n2")
    assert argv[1:4] == ("-m", "orchestrator.worker.observe", str(world.paths(run).run_dir))


def test_a_node_that_is_silent_is_named_and_not_waited_for_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.operations.attach._ANSWER_S", 0.1)
    run = on_two_nodes(world)
    streaming(world, rank("n1", 0), end("n1"))
    usage = look(world, run)
    assert usage.silent == ("n2",)
    assert [use.rank for use in usage.ranks] == [0]
    assert "no word from n2" in "".join(part for line in usage_lines(usage) for part, _ in line)


def test_a_step_that_cannot_start_is_an_error_in_its_own_words(world: World) -> None:
    run, _ = world.running()
    words = "srun: error: Unable to create step for job 101: Requested nodes are busy"
    streaming(world, then=f"sys.exit({words!r})")
    with pytest.raises(BackendError, match=r"no node of .* answered: Unable to create step for job 101"):
        look(world, run)


def test_looking_needs_the_schedulers_program(world: World) -> None:
    run, _ = world.running()
    world.backend.step = ("/nonexistent/srun",)
    with pytest.raises(BackendError, match="command not found"):
        look(world, run)


def test_without_torchrun_a_rank_is_a_node(world: World) -> None:
    run = on_two_nodes(world)
    plan = world.paths(run).agent_plan
    write_json(plan, {**read_json(plan), "torchrun": None})
    streaming(world, rank("n2", None), end("n2"), rank("n1", None), end("n1"))
    assert [(use.rank, use.node) for use in look(world, run).ranks] == [(0, "n1"), (1, "n2")]
    place = str(world.paths(run).run_dir)
    beside = operations.shell(place, rank=1, command=["ls"], open_backend=world.backend.open)
    assert (beside.node, beside.container) == ("n2", None)
    assert world.backend.steps[-1][0] == ("n2",)
    assert _argv(world)[-3:] == ("-", "-", "ls")
    with pytest.raises(BackendError, match="has no rank 2"):
        operations.shell(place, rank=2, open_backend=world.backend.open)


def _argv(world: World) -> tuple[str, ...]:
    return world.backend.steps[-1][1]


def test_the_nodes_are_asked_where_a_rank_is(world: World) -> None:
    run = on_two_nodes(world)
    streaming(world, rank("n2", 0), end("n2"), rank("n1", 1), end("n1"))
    place = str(world.paths(run).run_dir)
    assert operations.shell(place, rank=0, open_backend=world.backend.open).node == "n2"
    assert _argv(world)[-2:] == ("0", "-")
    with pytest.raises(BackendError, match="has no rank 5 now"):
        operations.shell(place, rank=5, open_backend=world.backend.open)


def test_the_container_is_that_of_the_newest_attempt_and_must_hold_our_program(world: World) -> None:
    run, _ = world.running()
    paths = world.paths(run)
    for container in ("old", "new"):
        EventLog(paths, "agent-n0").append("container_started", node="n1", runtime="docker", container=container)
    place = str(paths.run_dir)
    opened = operations.shell(place, command=["ls", "-l"], open_backend=world.backend.open)
    assert opened.container == "new"
    assert _argv(world)[-4:] == ("0", "new", "ls", "-l")
    (Path(read_json(paths.agent_plan)["library_dir"]) / "orchestrator" / "worker" / "ranks.py").unlink()
    with pytest.raises(BackendError, match="could not open shells in containers"):
        operations.shell(place, open_backend=world.backend.open)


def test_the_exit_code_of_the_command_is_ours(world: World) -> None:
    run, _ = world.running()
    world.backend.step = ("sh", "-c", "exit 7")
    assert operations.open_shell(operations.shell(str(world.paths(run).run_dir), open_backend=world.backend.open)) == 7


def test_a_run_that_is_not_running_has_no_inside(world: World) -> None:
    place = str(world.submit().run_dir)
    with pytest.raises(BackendError, match="queued, not running") as caught:
        operations.shell(place, open_backend=world.backend.open)
    assert caught.value.hint is not None
    assert "`orch shell` needs a running job" in caught.value.hint
    with pytest.raises(BackendError, match="queued, not running"):
        next(operations.top(place, open_backend=world.backend.open))
