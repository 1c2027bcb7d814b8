"""What each provider takes, and what its answers mean."""
