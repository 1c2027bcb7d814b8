"""The body of a request, within its limit and unpacked."""

import zlib

import falcon

from server.errors import InvalidArgument
from server.events.schema import MAX_REQUEST_BYTES

_GZIP_WINDOW = 31  # zlib's number for "with a gzip header"


def read_json(req: falcon.Request) -> bytes:
    """Return the body of a request that says it is JSON; raises InvalidArgument, or 415."""
    media_type = (req.content_type or "").partition(";")[0].strip().lower()
    if media_type != falcon.MEDIA_JSON:
        raise falcon.HTTPUnsupportedMediaType(title="Content-Type must be application/json")
    coding = (req.get_header("Content-Encoding") or "identity").strip().lower()
    if coding not in ("identity", "gzip"):
        raise falcon.HTTPUnsupportedMediaType(title="Content-Encoding must be identity or gzip")
    if (req.content_length or 0) <= MAX_REQUEST_BYTES:
        body: bytes = req.bounded_stream.read()
        if coding == "gzip":
            body = _decompress(body)
        if len(body) <= MAX_REQUEST_BYTES:
            return body
    raise InvalidArgument(f"body: larger than {MAX_REQUEST_BYTES} bytes")


def _decompress(body: bytes) -> bytes:
    """Return the content of a gzip body, up to one byte over the limit."""
    member = zlib.decompressobj(_GZIP_WINDOW)
    try:
        content = member.decompress(body, MAX_REQUEST_BYTES + 1)
    except zlib.error:
        raise InvalidArgument("body: invalid gzip") from None
    # Further members are refused: a body of many tiny ones takes minutes to read.
    if len(content) <= MAX_REQUEST_BYTES and (not member.eof or member.unused_data):
        raise InvalidArgument("body: invalid gzip")
    return content
