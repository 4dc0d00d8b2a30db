"""jobs.pretrain, interrupted from outside at random moments: the same exported weights, optimizer state and metrics.csv
as the run nobody touched, bit for bit, at world sizes 1, 2 and 4, with DataLoader workers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.data.digits import write_digits
from jobs.pretrain.__main__ import main
from jobs.pretrain.run import run
from jobs.pretrain.settings import PretrainSettings, parse_settings
from orchestrator.checkpoint import open_store
from orchestrator.paths import RunPaths
from orchestrator.registry import read_events
from orchestrator.spec.arguments import render_argument
from tests.integration.forked import Interruption, outputs, run_ranks
from tests.integration.test_exact_loops import differences
from tests.integration.toy import verdict

pytestmark = pytest.mark.slow

STEPS = 48  # 4 epochs of 12
EVERY_STEPS = 5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PretrainSettings:
    digits = tmp_path_factory.mktemp("digits") / "images"
    write_digits(digits, limit=390)
    parsed: PretrainSettings = parse_settings(
        {
            "data": str(digits),
            "model_args": {"width": 4},
            "method_args": {"hidden_dim": 32, "output_dim": 16},
            "epochs": 4,
            "batch_size": 32,
            "num_workers": 2,
            "log_every_n_steps": 1,
            "checkpoint_args": {"every_steps": EVERY_STEPS},
        }
    )
    return parsed


@pytest.fixture(scope="module")
def reference(settings: PretrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    done: dict[int, Path] = {}

    def untouched(world_size: int) -> Path:
        if world_size not in done:
            run_dir = tmp_path_factory.mktemp(f"reference{world_size}")
            codes = run_ranks(partial(run, settings), run_dir, world_size=world_size, attempt=0)
            assert set(codes) == {0}, outputs(run_dir, 0)
            assert verdict(run_dir, 0)["step"] == STEPS
            done[world_size] = run_dir
        return done[world_size]

    return untouched


def run_interrupted(settings: PretrainSettings, interruption: Interruption) -> None:
    interruption.watch()
    run(settings)


def optimizer_state(run_dir: Path) -> Any:
    found = open_store(str(run_dir / "checkpoints")).find()
    assert found is not None
    assert found.manifest.step == STEPS
    checkpoint = torch.load(found.path, weights_only=True)
    return checkpoint["optimizer_states"], checkpoint["lr_schedulers"], checkpoint["state_dict"], checkpoint["loops"]


def assert_exact(expected: Path, actual: Path) -> None:
    exported = [run_dir / "exported_models" / "exported_last.pt" for run_dir in (expected, actual)]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    assert (actual / "metrics.csv").read_text().splitlines() == (expected / "metrics.csv").read_text().splitlines()
    assert differences(optimizer_state(expected), optimizer_state(actual)) == []


def committed_steps(run_dir: Path, attempt: int) -> Iterator[int]:
    for event in read_events(RunPaths(run_dir)):
        if event["event"] == "checkpoint_committed" and event["attempt"] == attempt:
            yield event["step"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_three_stops_at_random_moments(
    settings: PretrainSettings, reference: Callable[[int], Path], tmp_path: Path, world_size: int
) -> None:
    expected = reference(world_size)
    draw = random.Random()  # other moments every time: the result must not depend on them
    step = 0
    for attempt in range(3):
        stop = Interruption(
            tmp_path,
            attempt,
            step=step + draw.randint(1, 2),
            number=draw.choice([signal.SIGUSR1, signal.SIGTERM]),
            rank=draw.randrange(world_size),
            group=attempt == 1,
            delay_s=draw.uniform(0, 0.03),
        )
        codes = run_ranks(partial(run_interrupted, settings, stop), tmp_path, world_size=world_size, attempt=attempt)
        assert set(codes) == {0}, (stop, outputs(tmp_path, attempt))
        said = verdict(tmp_path, attempt)
        assert said["outcome"] == "saved", (stop, said, outputs(tmp_path, attempt))
        assert said["step"] > step
        step = said["step"]
    codes = run_ranks(partial(run, settings), tmp_path, world_size=world_size, attempt=3)
    assert set(codes) == {0}, outputs(tmp_path, 3)
    assert verdict(tmp_path, 3)["outcome"] == "completed"
    assert_exact(expected, tmp_path)


def test_a_killed_rank_costs_at_most_the_steps_since_the_last_save(
    settings: PretrainSettings, reference: Callable[[int], Path], tmp_path: Path
) -> None:
    killed_at = 8
    kill = Interruption(tmp_path, 0, killed_at, signal.SIGKILL, rank=1)
    codes = run_ranks(partial(run_interrupted, settings, kill), tmp_path, world_size=2, attempt=0)
    assert codes[1] == -signal.SIGKILL
    saved = max(committed_steps(tmp_path, 0))
    codes = run_ranks(partial(run, settings), tmp_path, world_size=2, attempt=1)
    assert set(codes) == {0}, outputs(tmp_path, 1)
    resumed = [event for event in read_events(RunPaths(tmp_path)) if event["event"] == "resumed"]
    assert [event["step"] for event in resumed] == [saved]
    assert killed_at - saved <= EVERY_STEPS
    assert_exact(reference(2), tmp_path)


def test_a_stop_after_the_last_step_loses_nothing(
    settings: PretrainSettings, reference: Callable[[int], Path], tmp_path: Path
) -> None:
    last = Interruption(tmp_path, 0, STEPS, signal.SIGUSR1)
    codes = run_ranks(partial(run_interrupted, settings, last), tmp_path, world_size=1, attempt=0)
    assert codes == [0], outputs(tmp_path, 0)
    assert verdict(tmp_path, 0)["step"] == STEPS
    if verdict(tmp_path, 0)["outcome"] == "saved":  # otherwise the export was faster than the signal
        assert run_ranks(partial(run, settings), tmp_path, world_size=1, attempt=1) == [0]
    assert_exact(reference(1), tmp_path)


def _command(settings: PretrainSettings, **changed: object) -> None:
    values = {**settings.model_dump(mode="json", exclude_defaults=True), **changed}
    sys.exit(
        main([f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()])
    )


def test_a_finished_run_is_found_finished_and_keeps_its_settings(
    settings: PretrainSettings, reference: Callable[[int], Path], tmp_path: Path
) -> None:
    expected = reference(1)
    run_dir = tmp_path / "copy"
    shutil.copytree(expected, run_dir, symlinks=True)
    assert run_ranks(partial(_command, settings), run_dir, world_size=1, attempt=1) == [0], outputs(run_dir, 1)
    assert_exact(expected, run_dir)
    codes = run_ranks(partial(_command, settings, epochs=5), run_dir, world_size=1, attempt=2)
    assert codes == [7]
    assert "epochs: 4 before, 5 now" in outputs(run_dir, 2)
    codes = run_ranks(partial(_command, settings, batch_size=33), tmp_path / "odd", world_size=2, attempt=0)
    assert set(codes) == {2}
    assert "use batch_size 32" in outputs(tmp_path / "odd", 0)


def test_a_run_begins_with_the_checkpoint_of_another(
    settings: PretrainSettings, reference: Callable[[int], Path], tmp_path: Path
) -> None:
    """The first run ends after two of four epochs; the second has its own settings record and metrics.csv."""
    gone, ours = tmp_path / "gone.ckpt", tmp_path / "ours"
    codes = run_ranks(partial(_command, settings, start_from=str(gone)), ours, world_size=2, attempt=0)
    assert set(codes) == {5}
    assert "there is no such file" in verdict(ours, 0)["message"]
    theirs = tmp_path / "theirs"
    stop = Interruption(theirs, 0, STEPS // 2, signal.SIGUSR1)
    assert run_ranks(partial(run_interrupted, settings, stop), theirs, world_size=2, attempt=0) == [0, 0]
    begun = verdict(theirs, 0)["step"]
    elsewhere = settings.model_copy(update={"start_from": str(theirs / "checkpoints")})
    assert run_ranks(partial(run, elsewhere), ours, world_size=2, attempt=1) == [0, 0], outputs(ours, 1)
    [resumed] = [event for event in read_events(RunPaths(ours)) if event["event"] == "resumed"]
    assert resumed["step"] == begun
    assert str(theirs / "checkpoints") in resumed["start_from"]
    exported = [run_dir / "exported_models" / "exported_last.pt" for run_dir in (reference(2), ours)]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    assert differences(optimizer_state(reference(2)), optimizer_state(ours)) == []


def test_a_seed_drawn_once_is_used_again(settings: PretrainSettings, tmp_path: Path) -> None:
    unseeded = settings.model_copy(update={"seed": None, "epochs": 1})
    stop = Interruption(tmp_path, 0, 3, signal.SIGUSR1)
    assert run_ranks(partial(run_interrupted, unseeded, stop), tmp_path, world_size=2, attempt=0) == [0, 0]
    seed = json.loads((tmp_path / "environment.json").read_text())["seed"]
    assert run_ranks(partial(run, unseeded), tmp_path, world_size=2, attempt=1) == [0, 0], outputs(tmp_path, 1)
    assert json.loads((tmp_path / "environment.json").read_text())["seed"] == seed
    assert f'"seed": {seed}' in (tmp_path / "train.log").read_text()


def test_under_a_bare_torchrun(settings: PretrainSettings, reference: Callable[[int], Path], tmp_path: Path) -> None:
    """No ORCH_* variables: the ranks agree through torchrun's store, save, pass a barrier and exit with 75."""
    values = {**settings.model_dump(mode="json", exclude_defaults=True), "out": str(tmp_path)}
    words = [f"--{key}={render_argument(value)}" for key, value in values.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*torchrun, "--rdzv-endpoint=127.0.0.1:0", "-m", "jobs.pretrain", "--", *words]
    output = tmp_path.parent / "torchrun.txt"
    for attempt in (0, 1):
        with output.open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
            stop, sent = Interruption(tmp_path, 0, 3, signal.SIGUSR1), False
            while process.poll() is None:
                if attempt == 0 and not sent and stop.reached():
                    os.kill(_children(process.pid)[0], stop.number)
                    sent = True
                try:
                    process.wait(timeout=0.05)
                except subprocess.TimeoutExpired:
                    continue
        text = output.read_text()
        assert "exitcode  : 75" in text, text
        assert verdict(tmp_path, attempt)["outcome"] == ("saved" if attempt == 0 else "completed"), text
    assert process.returncode == 0
    assert_exact(reference(2), tmp_path)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
