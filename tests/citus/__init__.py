"""Tests against a cluster of Citus: those of other packages, and what happens to its nodes."""
