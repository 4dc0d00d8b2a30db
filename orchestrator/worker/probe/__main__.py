"""Carry out one request and print the answer as one JSON line, whatever else a login or a prolog prints.

{"disks": [PATH…]}                                   a DiskFacts each
{"spaces": [PATH…]}                                  [free bytes, mount point] each
{"engine": {"runtime": NAME, "image": IMAGE | null}} EngineFacts
{"store": {"uri": URL, "storage_options": {…}, "fence": "store" | "disk"}}
                                                     StoreFacts
{"node": {"meeting": DIR, "nonce": TEXT, "engine": NAME | null, "image": IMAGE | null}}
                                                     NodeFacts; with engine EngineFacts, from a container if IMAGE
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.worker.node import NodeDirectory, node_root
from orchestrator.worker.probe.disk import measure_space, probe_disk
from orchestrator.worker.probe.engine import probe_container, probe_engine
from orchestrator.worker.probe.node import probe_node
from orchestrator.worker.probe.store import probe_store


def answer(request: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The facts that were asked for, in JSON's types."""
    facts: dict[str, Any] = {}
    if "disks" in request:
        facts["disks"] = [asdict(probe_disk(Path(path))) for path in request["disks"]]
    if "spaces" in request:
        facts["spaces"] = [list(measure_space(Path(path))) for path in request["spaces"]]
    if "engine" in request:
        facts["engine"] = asdict(probe_engine(request["engine"]["runtime"], request["engine"]["image"]))
    if "store" in request:
        facts["store"] = asdict(probe_store(request["store"]))
    if "node" in request:
        facts |= _on_node(request["node"], environ)
    return facts


def _on_node(node: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """With a node directory like an attempt's; a container writes where a run's would: there and below the root."""
    meeting, image = Path(node["meeting"]), node["image"]
    directory, error = None, ""
    try:
        directory = NodeDirectory(node_root(environ), f"doctor-{node['nonce']}")
    except OSError as fault:
        error = f"{fault.strerror or fault}"
    try:
        facts: dict[str, Any] = {"node": asdict(probe_node(meeting, node["nonce"], environ, node_dir_error=error))}
        if node["engine"] and image is None:
            facts["engine"] = asdict(probe_engine(node["engine"], None))
        elif node["engine"]:
            # A root that is not here is in the findings already, and there is nothing of it to mount.
            places = ([meeting] if meeting.is_dir() else []) + ([directory.path] if directory else [])
            facts["engine"] = asdict(probe_container(node["engine"], image, places))
        return facts
    finally:
        if directory is not None:
            directory.close()


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]), os.environ)))
