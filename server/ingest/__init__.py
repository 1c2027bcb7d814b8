"""The way of a request's events, from its key to its commit."""
