"""C4P: topology, hashing, flows, planning and probing of network paths. Pure decision code: no Ray, no torch."""
