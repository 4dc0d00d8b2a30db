"""`python -m orchestrator` is `orch`."""

import sys

from orchestrator.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
