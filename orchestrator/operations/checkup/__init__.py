"""`doctor`: what the cluster, the engine and the disk will do to a run, said before there is one.

`examine` asks and decides the order; `scheduler`, `accounting`, `engine`, `disk` and `node` turn answers into findings.
"""
