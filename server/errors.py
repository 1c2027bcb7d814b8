"""The errors that a caller of the service can be told, each with its gRPC code's name."""


class IngestError(Exception):
    """A request that was not carried out; its text is fit for the caller."""

    code = "INTERNAL"
    retry_after_seconds: int | None = None


class InvalidArgument(IngestError):
    """The request as a whole is malformed; sending it again cannot help."""

    code = "INVALID_ARGUMENT"


class Unauthenticated(IngestError):
    """The API key is missing, malformed, unknown or revoked: which, is not told."""

    code = "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("missing or invalid API key")


class ResourceExhausted(IngestError):
    """The API key's rate limit is reached: nothing was stored, and later the same may be sent."""

    code = "RESOURCE_EXHAUSTED"
    retry_after_seconds: int = 1

    def __init__(self, text: str, retry_after_seconds: int) -> None:
        super().__init__(text)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(IngestError):
    """The events could not be stored in time; sending them again is safe."""

    code = "UNAVAILABLE"
    retry_after_seconds = 1


class Internal(IngestError):
    """A fault of the service, logged where it happened and told without details."""

    code = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("internal error")
