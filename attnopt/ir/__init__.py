"""What an attention means: its frozen spec, its site, its edits, the reference semantics, and the interfaces of passes and backends."""
