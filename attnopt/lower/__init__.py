"""A canonical attention and what was decided about it become operators."""
