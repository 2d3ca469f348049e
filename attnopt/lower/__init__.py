"""Lowering: from canonical attentions and plans to operators."""
