"""An index selection carried backward to the weights that make it, or forward to the projection that reads it."""
