"""What knows nothing of attention or of graphs: options, notation, files, closeness of tensors, locks, the registry."""
