"""Hypothesis without a time limit per example: two busy cores must not fail a test."""

from hypothesis import settings

settings.register_profile("orch", deadline=None, max_examples=50)
settings.load_profile("orch")
