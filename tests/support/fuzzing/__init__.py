"""Random models with attentions, every law checked on each by the oracle, failures shrunk and kept."""
