"""The gRPC edge, and the only place that knows grpc."""
