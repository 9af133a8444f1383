"""Studies: models x methods x patterns x calibration draws, each cell a run of its own, from a file to a report."""
