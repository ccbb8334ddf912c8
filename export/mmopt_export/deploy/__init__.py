"""Hands an artifact to a serving engine that exists: one module per engine."""
