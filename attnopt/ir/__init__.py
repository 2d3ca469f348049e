"""What an attention means: spec, site, edits, reference semantics, and the interfaces of passes and backends."""
