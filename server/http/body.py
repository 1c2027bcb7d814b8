"""The body of a request, within its limit and unpacked."""

import zlib

import falcon

from server.errors import InvalidArgument
from server.events.schema import MAX_REQUEST_BYTES

_GZIP_WINDOW = 31  # zlib's number for "with a gzip header"


def _make_too_large() -> InvalidArgument:
    """Return the error for a body over the limit."""
    return InvalidArgument(f"body: larger than {MAX_REQUEST_BYTES} bytes")


def read_json(req: falcon.Request, max_bytes: int = MAX_REQUEST_BYTES) -> bytes | None:
    """Return the body of a request that says it is JSON, or None if it has over `max_bytes`.

    Only a compressed one can have more. Raises InvalidArgument, also for a body over the limit of
    all, and falcon's error for another type or coding.
    """
    media_type = (req.content_type or "").partition(";")[0].strip().lower()
    if media_type != falcon.MEDIA_JSON:
        raise falcon.HTTPUnsupportedMediaType(title="Content-Type must be application/json")
    coding = (req.get_header("Content-Encoding") or "identity").strip().lower()
    if coding not in ("identity", "gzip"):
        raise falcon.HTTPUnsupportedMediaType(title="Content-Encoding must be identity or gzip")
    if (req.content_length or 0) > MAX_REQUEST_BYTES:
        raise _make_too_large()
    body: bytes = req.bounded_stream.read()
    if coding == "gzip":
        return _decompress(body, max_bytes)
    return body


def _decompress(body: bytes, max_bytes: int) -> bytes | None:
    member = zlib.decompressobj(_GZIP_WINDOW)
    try:
        content = member.decompress(body, max_bytes + 1)
    except zlib.error:
        raise InvalidArgument("body: invalid gzip") from None
    if len(content) > MAX_REQUEST_BYTES:
        raise _make_too_large()
    if len(content) > max_bytes:
        return None
    # Further members are refused: a body of many tiny ones takes minutes to read.
    if not member.eof or member.unused_data:
        raise InvalidArgument("body: invalid gzip")
    return content
