"""State that lives on the cluster: Ray actors, and the plain decision logic that they run."""
