"""Tools on fx graphs: operators, sizes, emitter, evaluation, the normal form."""
