"""What each worker writes: a process group that records every collective into a shared-memory ring. No Ray."""
