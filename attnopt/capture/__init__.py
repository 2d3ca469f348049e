"""A model with inputs becomes a graph, with the signature, the guards and the caches of its calls."""
