"""What a plugin author subclasses or receives, and the patterns that select masks; nothing here runs a model."""
