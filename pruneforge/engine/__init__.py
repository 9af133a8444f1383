"""The loop: capture, calibrate, mask, propagate, block by block."""
