"""Checkpoints in S3 from containers on the real cluster: two nodes, preempted twice; no step lost, no secret told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.test_main_job import (  # noqa: F401 (fixtures)
    assert_no_step_was_lost_or_repeated,
    digits,
    main_job,
    workspace,
)
from tests.objects.servers import KEY, SECRET, Server, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving("moto", tmp_path) as running:
        yield running


def test_docker_on_two_nodes_preempted_twice(
    orch: Orch,
    cluster: Cluster,
    digits: Path,  # noqa: F811
    workspace: Path,  # noqa: F811
    server: Server,
) -> None:
    bucket = server.new_bucket()
    spec = main_job(cluster, digits, workspace, nodes=2, nproc=1, runtime="docker", epochs=20)
    spec["checkpoint"] |= {
        "uri": f"s3://{bucket}/runs",
        "storage_options": {"endpoint_url": server.endpoint},
    }
    spec["secrets"] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    run = orch.submit(spec, env=credentials)["run_id"]
    for attempt in range(2):
        orch.wait_for_step(run, orch.step(run) + 15, attempt=attempt)
        cluster.preempt(nodes=3, seconds=1)
        verdict = orch.run_dir(run) / f"verdict-{attempt:03d}.json"
        cluster.wait("the stop", verdict.exists, timeout=60)
        assert json.loads(verdict.read_text())["outcome"] == "saved"
    done = orch.wait_for_state(run, "completed", timeout=400)
    assert done["attempt"] == 2
    assert_no_step_was_lost_or_repeated(orch, run, 200)
    assert done["last_checkpoint"]["path"].startswith(f"s3://{bucket}/runs/{run}/step-000000200.")
    assert done["last_checkpoint"]["path"].removeprefix("s3://") in server.files().find(f"{bucket}/runs/{run}")
    assert not list((orch.run_dir(run) / "checkpoints").glob("step-*"))  # the emergency saves were brought in
    for path in (path for path in orch.run_dir(run).rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
