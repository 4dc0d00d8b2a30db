"""Rules for every test: under CI a skip is a failure, and no test inherits a scheduler or a run by accident."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# A busy machine makes single examples slow; how long a test may take is not Hypothesis's business.
settings.register_profile("orch", deadline=None)
settings.load_profile("orch")

_CI = os.environ.get("CI", "").lower() == "true"
# Reasons that no installation removes: "hardware: needs a GPU", "user: root reads everything".
_LASTING = ("hardware: ", "user: ")

# A test that meets the variables of a real allocation would take itself for a job of it.
for _name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "TORCHELASTIC_", "ORCH_RUN"))]:
    del os.environ[_name]
# Two workers on two cores: torch's own threads would only fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a test that was skipped has failed: there everything it needs must have been installed."""
    report = yield
    if _CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(_LASTING):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: skipped although CI=true: {reason}"
    return report
