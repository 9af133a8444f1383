"""Checkpoints of transformers: what the adapters of its models share."""
