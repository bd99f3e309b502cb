"""Live migration of requests between engines: protocol (pure), transports of KV blocks, and the migrator that drives both."""
