"""Rewrites as a model of the user's own class."""
