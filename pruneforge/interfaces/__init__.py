"""What a plugin author subclasses or receives; nothing here runs a model."""
