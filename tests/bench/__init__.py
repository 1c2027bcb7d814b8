"""How fast the service is: `scripts/bench`."""
