"""C++ headers that the CPU kernels share: the instruction set in use, vectors of it, and loops compiled once for each set."""
