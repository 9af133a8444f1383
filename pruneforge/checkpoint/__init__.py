"""What a run writes: an ordinary model folder, the masks, the report."""
