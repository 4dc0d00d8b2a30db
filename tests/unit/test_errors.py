"""What an error says where nobody prints it the way the command line does."""

from __future__ import annotations

import pickle
import traceback

from orchestrator.errors import CheckpointCorrupt, OrchError, SpecError


def test_a_traceback_ends_in_the_hint() -> None:
    error = CheckpointCorrupt("last.ckpt does not match its manifest", hint="restore a copy")
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    assert lines == [
        "orchestrator.errors.CheckpointCorrupt: last.ckpt does not match its manifest",
        "hint: restore a copy",
    ]
    assert str(error) == "last.ckpt does not match its manifest"


def test_without_a_hint_nothing_is_added_and_with_one_it_is_there_once() -> None:
    assert not hasattr(OrchError("no"), "__notes__")
    assert SpecError("no", hint="look", problems=({"message": "no"},)).__notes__ == ["hint: look"]
    again = pickle.loads(pickle.dumps(OrchError("no", hint="look")))
    assert (again.hint, again.__notes__) == ("look", ["hint: look"])
