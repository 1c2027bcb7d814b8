"""Access to the console, which shows what users did and so must not be open to everybody."""

import base64
import binascii
import hashlib
import hmac
from urllib.parse import urlsplit

import falcon

_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Vary": "Accept",
}


class Access:
    """Checks each request of the console, and tells browsers what its pages may do.

    `hosts` are the names under which it may be asked for: a page of another site can have its own
    name resolved to this address, but can send no other name than its own. Without a password,
    whoever reaches the console may see it.
    """

    def __init__(self, hosts: frozenset[str], password: str | None) -> None:
        self._hosts = hosts
        self._digest = None if password is None else _digest(password)

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        """Refuse a request from another site, under another name, or without the password."""
        if _read_name(req.get_header("Host") or "") not in self._hosts:
            raise falcon.HTTPError(
                falcon.HTTP_421, title="CONSOLE_HOSTS does not have this host's name"
            )
        # A browser says so if another site's page asks; a link from there is no such thing.
        is_foreign = req.get_header("Sec-Fetch-Site") in ("cross-site", "same-site")
        if is_foreign and req.get_header("Sec-Fetch-Mode") != "navigate":
            raise falcon.HTTPForbidden(title="asked by a page of another site")
        if self._digest is not None and not self._has_password(req):
            raise falcon.HTTPUnauthorized(
                title="the password is CONSOLE_PASSWORD, with any name",
                challenges=['Basic realm="ProductGraph", charset="UTF-8"'],
            )

    def process_response(
        self, _req: falcon.Request, resp: falcon.Response, _resource: object, _ok: bool
    ) -> None:
        """Add the headers that restrict what a page may do."""
        resp.set_headers(_HEADERS)

    def _has_password(self, req: falcon.Request) -> bool:
        assert self._digest is not None
        scheme, _, encoded = (req.get_header("Authorization") or "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            _, _, password = base64.b64decode(encoded, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(hashlib.sha256(password).digest(), self._digest)


def _digest(password: str) -> bytes:
    """Return a digest, so that the comparison tells nothing of the length either."""
    return hashlib.sha256(password.encode()).digest()


def _read_name(host: str) -> str | None:
    """Return the name of a Host header, without the port; None if there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
