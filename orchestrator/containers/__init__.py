"""Image references and one payload per runtime: how PID 1 (worker/launch) is started, watched and ended on a node."""
