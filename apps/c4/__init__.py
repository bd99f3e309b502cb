"""C4: find the faulty part of a training job, isolate it, and be training again in seconds."""
