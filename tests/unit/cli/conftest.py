"""The command line in this process: `cli(...)` gives exit code, stdout and stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import main
from tests.unit.operations.conftest import World, world

__all__ = ["World", "world"]


@dataclass
class Said:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as the one JSON document it must be."""
        return json.loads(self.out)


Cli = Callable[..., Said]


@pytest.fixture
def cli(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("TOKEN", "s3cret-value")
    monkeypatch.delenv("ORCH_ROOT", raising=False)
    monkeypatch.delenv("ORCH_DEBUG", raising=False)

    def run(*arguments: str | Path) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Said(code, captured.out, captured.err)

    return run
