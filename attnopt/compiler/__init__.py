"""The driver: policy, registry of plugins, decisions, budget, checks."""
