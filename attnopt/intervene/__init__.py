"""Interventions on the heads of any model: patching, path patching, and the search for heads."""
