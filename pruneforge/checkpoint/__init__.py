"""Checkpoint files: read, rewrite, masks, journal, durable writes."""
