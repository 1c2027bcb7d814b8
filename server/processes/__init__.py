"""Processes: supervision, ports, the lifeline to a parent, priority."""
