from __future__ import annotations

from pathlib import Path

import pytest

from jobs.pretrain.record import (
    describe_data,
    describe_environment,
    environment_changes,
    load_record,
    refuse_drift,
    write_record,
)
from jobs.pretrain.settings import parse_settings
from orchestrator.errors import RefusedError


def test_a_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    path, data = tmp_path / "environment.json", describe_data(["a/1.png", "b/2.png"])
    settings = parse_settings({"data": "d", "epochs": 3})
    environment = describe_environment(1)
    assert load_record(path) is None
    write_record(path, None, settings=settings, seed=5, data=data, attempt=0, environment=environment)
    record = load_record(path)
    assert record is not None
    assert record["seed"] == 5
    refuse_drift(record, parse_settings({"data": "d", "epochs": 3, "num_workers": 7}), data)
    with pytest.raises(RefusedError, match="epochs: 3 before, 4 now"):
        refuse_drift(record, parse_settings({"data": "d", "epochs": 4}), data)
    refuse_drift(record, parse_settings({"data": "d", "epochs": 4}), data, ["job.args.epochs"])
    refuse_drift(record, settings, describe_data(["a/1.png"]), ["data"])
    with pytest.raises(RefusedError, match="the images: 2 before, 1 now"):
        refuse_drift(record, settings, describe_data(["a/1.png"]))
    write_record(path, record, settings=settings, seed=5, data=data, attempt=1, environment=environment)
    again = load_record(path)
    assert again is not None
    assert list(again["attempts"]) == ["0", "1"]
    assert environment_changes(again, environment) == []
    assert "threads was" in environment_changes(again, {**environment, "threads": 99})[0]
