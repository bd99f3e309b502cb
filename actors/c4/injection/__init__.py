"""Fault injection: from outside by signals and limits, inside a worker by a hook that is off unless it is asked for."""
