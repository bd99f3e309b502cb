"""The C4 monitors: an agent actor a node reads the rings of its workers, one master actor gathers, judges and answers."""
