"""The errors that a caller may be told, each with the name of its gRPC code."""

from collections.abc import Sequence


class IngestError(Exception):
    """A request that was not carried out. Its text may be shown to the caller."""

    code = "INTERNAL"
    retry_after_seconds: int | None = None


class InvalidArgument(IngestError):
    """The request as a whole is malformed; sending it again cannot help."""

    code = "INVALID_ARGUMENT"


class InvalidEvents(InvalidArgument):
    """Events of a batch are invalid, and its sender wants all of it stored or nothing.

    `errors` has the index of each such event and what is wrong with it.
    """

    errors: Sequence[tuple[int, str]] = ()

    def __init__(self, errors: Sequence[tuple[int, str]], count: int) -> None:
        super().__init__(f"events: {len(errors)} of {count} are invalid, nothing was stored")
        self.errors = errors


class Unauthenticated(IngestError):
    """The API key is missing, malformed, unknown, revoked or ended; the text does not say which."""

    code = "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("missing or invalid API key")


class PermissionDenied(IngestError):
    """The API key must not be used by a page of this origin."""

    code = "PERMISSION_DENIED"

    def __init__(self) -> None:
        super().__init__("this API key is not for pages of this origin")


class ResourceExhausted(IngestError):
    """An API key has reached its rate limit, or a project its quota: the same may be sent later.

    Nothing was stored.
    """

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
    """A fault of the service. It is logged where it happened; the caller gets no details."""

    code = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("internal error")
