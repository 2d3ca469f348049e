"""What every head of a model does: taps, read from data or exposed as outputs, and attributions."""
