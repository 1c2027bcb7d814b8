"""What can be seen of the service: log lines, metrics, traces."""
