"""Stored events on their way to analytics providers."""
