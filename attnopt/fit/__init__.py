"""Statistics of calibration data, and closed-form weights of one site."""
