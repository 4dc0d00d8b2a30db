"""`orch`: a spec becomes a run that cannot lose work.

The package itself imports nothing, so that `import orchestrator` costs nothing on a login node; reading the folder
list top to bottom (spec, identity, plan, backends, worker, checkpoint, registry) is reading how a spec travels.
"""

__version__ = "0.1.0"
