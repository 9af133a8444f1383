"""The loop: capture, calibrate, score, select, apply, propagate."""
