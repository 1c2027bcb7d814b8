"""CORS for pages of any allowed origin."""

from collections.abc import Collection

import falcon

# For so long a browser may go by an older list of origins, too.
_PREFLIGHT_SECONDS = 86_400
_EXPOSED_HEADERS = "Preference-Applied, RateLimit, RateLimit-Policy, Retry-After, X-Request-ID"


class CrossOrigin:
    """Middleware that lets pages read the answers; `allowed_origins` may hold `*` for any.

    An origin is echoed together with Access-Control-Allow-Credentials because the browser SDK sends
    credentialed requests, which a browser refuses to pair with `*`. That is safe even for any
    origin: no cookie or other credential that a browser adds by itself is ever read here, only the
    API key that the page itself puts into a header.
    """

    def __init__(self, allowed_origins: Collection[str]) -> None:
        self._allowed = frozenset(allowed_origins)

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer a preflight, which carries no key."""
        if req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method"):
            resp.complete = True
            resp.status = falcon.HTTP_204
            resp.set_header("Access-Control-Allow-Methods", "GET, POST")
            resp.set_header("Access-Control-Max-Age", str(_PREFLIGHT_SECONDS))
            if headers := req.get_header("Access-Control-Request-Headers"):
                resp.set_header("Access-Control-Allow-Headers", headers)

    def process_response(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        _resource: object,
        _succeeded: bool,
    ) -> None:
        """Add the headers to an answer, whatever it is."""
        resp.append_header("Vary", "Origin")
        origin = req.get_header("Origin")
        if origin and ("*" in self._allowed or origin in self._allowed):
            resp.set_header("Access-Control-Allow-Origin", origin)
            resp.set_header("Access-Control-Allow-Credentials", "true")
            resp.set_header("Access-Control-Expose-Headers", _EXPOSED_HEADERS)
