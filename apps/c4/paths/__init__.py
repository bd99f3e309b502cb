"""C4P on the command line: plans, simulations, and the fabric lab in network namespaces."""
