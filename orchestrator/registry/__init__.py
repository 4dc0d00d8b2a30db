"""What is known about runs: files in the run directories (PROTOCOLS 2), written here and read here."""

from orchestrator.registry.events import EventLog, read_events
from orchestrator.registry.metrics import MetricRow, MetricsLog, iter_metrics
from orchestrator.registry.progress import HeartbeatThread, ProgressWriter
from orchestrator.registry.runs import RunView, load_run
from orchestrator.registry.sidecar import SidecarWriter, load_sidecar

__all__ = [
    "EventLog",
    "HeartbeatThread",
    "MetricRow",
    "MetricsLog",
    "ProgressWriter",
    "RunView",
    "SidecarWriter",
    "iter_metrics",
    "load_run",
    "load_sidecar",
    "read_events",
]
