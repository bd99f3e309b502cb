"""C4: monitors around training workers that name the faulty part, isolate it and resume; network paths."""
