"""Fault injection as a tool: faults by plan into a real run, and the comparison with the run that was left alone."""
