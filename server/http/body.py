"""The body of a request, within its limit and unpacked."""

import zlib

import falcon

from server.errors import InvalidArgument
from server.events.schema import MAX_REQUEST_BYTES

_GZIP_WINDOW = 31  # zlib's number for "with a gzip header"
# Programs that append to a compressed file make a few; a body of many tiny ones would take minutes.
_MAX_MEMBERS = 16


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
    is_compressed = _is_compressed(req.get_header("Content-Encoding") or "")
    if (req.content_length or 0) > MAX_REQUEST_BYTES:
        raise _make_too_large()
    body: bytes = req.bounded_stream.read()
    return _decompress(body, max_bytes) if is_compressed else body


def _is_compressed(content_encoding: str) -> bool:
    """Tell whether a body is gzip, by the list of its codings; raises 415 for any other."""
    codings = [coding.strip().lower() for coding in content_encoding.split(",")]
    applied = [coding for coding in codings if coding not in ("", "identity")]
    if applied and applied not in (["gzip"], ["x-gzip"]):
        # https://www.rfc-editor.org/rfc/rfc9110#section-15.5.16
        raise falcon.HTTPUnsupportedMediaType(
            title="Content-Encoding must be identity or gzip", headers={"Accept-Encoding": "gzip"}
        )
    return bool(applied)


def _decompress(body: bytes, max_bytes: int) -> bytes | None:
    if not max_bytes:
        return None
    content = b""
    for _ in range(_MAX_MEMBERS):
        member = zlib.decompressobj(_GZIP_WINDOW)
        try:
            content += member.decompress(body, max_bytes + 1 - len(content))
        except zlib.error:
            raise InvalidArgument("body: invalid gzip") from None
        if len(content) > MAX_REQUEST_BYTES:
            raise _make_too_large()
        if len(content) > max_bytes:
            return None
        if not member.eof:
            raise InvalidArgument("body: invalid gzip")
        body = member.unused_data
        if not body:
            return content
    raise InvalidArgument(f"body: more than {_MAX_MEMBERS} gzip members")
