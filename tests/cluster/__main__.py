"""`make cluster`: a cluster by hand. Prints the lines to export, stays until Ctrl-C, then ends everything."""

from __future__ import annotations

import signal
import sys

from tests.cluster.handle import Cluster, show_environment
from tests.cluster.requirements import why_not
from tests.cluster.service import ClusterError


def main() -> int:
    """Options are the supervisor's (`--slurm 24.11`, `--no-accounting`, `--no-docker`, `--no-image`, …)."""
    reason = why_not()
    if reason is not None:
        print(f"make cluster: {reason}", file=sys.stderr)
        return 1
    try:
        cluster = Cluster.start(*sys.argv[1:])
    except ClusterError as error:
        print(f"make cluster: {error}", file=sys.stderr)
        return 1
    try:
        print(f"# The cluster is up in {cluster.directory} (logs in log/); in another shell:")
        print(show_environment(cluster), end="")
        print(f"export ORCH_TEST_CLUSTER={cluster.directory}   # pytest then uses this cluster")
        print(f"# Slurm {cluster.slurm_version}, image: {cluster.image}\n# Ctrl-C ends it.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        cluster.hold()
        print("# the cluster has ended by itself", flush=True)
    except KeyboardInterrupt:
        print("\n# ending the cluster", flush=True)
    finally:
        cluster.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
