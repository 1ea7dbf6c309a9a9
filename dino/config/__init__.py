"""Settings: what can be set (schema), how that is read and checked (read), what `auto` becomes (auto)."""
