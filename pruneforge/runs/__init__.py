"""What a user calls: prune, evaluate, compare, estimate; recipe in, report out."""
