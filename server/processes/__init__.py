"""Processes and what joins them: supervision, ports, priority."""
