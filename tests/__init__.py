"""Tests: of the parts, of a running service, and of its speed and firmness."""
