"""What text and images are, and how calibration data are drawn."""
