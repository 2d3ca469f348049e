"""Helpers independent of attention and graphs: options, notation, files, closeness of tensors, locks, the registry."""
