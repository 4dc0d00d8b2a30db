"""The object store of a spec: findings from facts, and the facts of two real servers and of one that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.operations.checkup.store import store_findings
from orchestrator.worker.probe.store import StoreFacts, probe_store
from tests.cluster.service import free_port
from tests.objects.servers import serving
from tests.unit.operations.checkup.given import words


def test_a_store_that_honours_everything() -> None:
    assert words(store_findings(StoreFacts("s3://b/p")), "checkpoints") == [
        ("ok", "s3://b/p: writable, consistent, honours conditional writes")
    ]


def test_a_missing_guarantee_is_a_warning_and_a_missing_store_is_bad() -> None:
    weak = StoreFacts("s3://b/p", weaknesses=("two attempts may …", "last.json may …"))
    assert [level for level, _ in words(store_findings(weak), "checkpoints")] == ["warn", "warn"]
    assert words(store_findings(StoreFacts("s3://b/p", error="no")), "checkpoints") == [("bad", "no")]


@pytest.mark.parametrize(
    ("kind", "fence", "missing"), [("moto", "store", 0), ("rclone", "store", 2), ("rclone", "disk", 1)]
)
def test_real_servers(tmp_path: Path, kind: str, fence: str, missing: int) -> None:
    with serving(kind, tmp_path) as server:
        bucket = server.new_bucket()
        checkpoint = {"uri": f"s3://{bucket}/runs", "storage_options": server.storage_options, "fence": fence}
        facts = probe_store(checkpoint)
        assert (facts.error, len(facts.weaknesses)) == ("", missing)
        assert server.files().find(bucket) == []
        assert "no-such-bucket" in probe_store({**checkpoint, "uri": "s3://no-such-bucket/x"}).error


def test_a_server_that_is_not_there_is_one_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(
        "name: x\nbackend: local\njob: {module: m}\ncheckpoint:\n  uri: s3://bucket/x\n"
        f"  storage_options: {{anon: true, endpoint_url: 'http://127.0.0.1:{free_port()}'}}\n"
    )
    assert main(["doctor", "spec.yaml"]) == 5
    assert "s3://bucket/x" in capsys.readouterr().out
