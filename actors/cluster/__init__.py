"""How a program meets the cluster: starting or attaching to Ray, and naming its metrics."""
