"""The HTTP edge, and the only place that knows Falcon and waitress."""
