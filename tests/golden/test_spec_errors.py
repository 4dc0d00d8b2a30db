"""Every message about a wrong spec, word by word. After a wanted change:  ORCH_ACCEPT=1 pytest tests/golden

Then read the diff.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import load_spec

FOLDER = Path(__file__).parent / "spec_errors"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def message_of(error: SpecError) -> str:
    hint = f"\nhint: {error.hint}" if error.hint else ""
    return f"{error}{hint}\n".replace(str(FOLDER), "DIR")


@pytest.mark.parametrize("name", CASES)
def test_message_is_the_accepted_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    with pytest.raises(SpecError) as caught:
        load_spec(f"{name}.yaml", environ={})
    message = message_of(caught.value)
    golden = FOLDER / f"{name}.txt"
    if os.environ.get("ORCH_ACCEPT"):
        golden.write_text(message, encoding="utf-8")
    accepted = golden.read_text(encoding="utf-8") if golden.exists() else ""
    diff = "".join(difflib.unified_diff(accepted.splitlines(True), message.splitlines(True), "accepted", "now", n=1))
    assert message == accepted, f"\n{diff}\nWanted?  ORCH_ACCEPT=1 .venv/bin/pytest tests/golden"


@pytest.mark.parametrize("name", CASES)
def test_no_message_repeats_what_may_be_a_secret(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(FOLDER / f"{name}.yaml", environ={})
    assert "never shown" not in str(caught.value)
    assert "never shown" not in str(caught.value.problems)
