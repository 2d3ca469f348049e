"""From a graph to proven, canonical attentions."""
