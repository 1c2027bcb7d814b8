"""The names of the protocols, as logs, metrics and stored rejections have them."""

HTTP = "http"
GRPC = "grpc"
