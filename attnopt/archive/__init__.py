"""Saving and loading an optimized model."""
