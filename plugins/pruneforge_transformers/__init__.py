"""Checkpoints of the transformers library, for the adapters of its models."""
