"""What drives an engine or a scorer to measure it: curves, rewards of samples, rejection sampling, calibration."""
