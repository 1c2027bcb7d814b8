"""The body of a request: within its limit, and unpacked no further."""

import gzip

import falcon
import pytest
from falcon.testing import create_req

from server.errors import InvalidArgument
from server.http.body import read_json

KILOBYTE = 1024
# What is behind its first megabyte is broken.
BROKEN = gzip.compress(bytes(KILOBYTE * KILOBYTE))[:-8] + bytes(8)


def make_request(body: bytes) -> falcon.Request:
    """Return a request with a compressed body."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    return create_req(method="POST", body=body, headers=headers)


@pytest.mark.parametrize("most", [0, 1, KILOBYTE, KILOBYTE * KILOBYTE - KILOBYTE])
def test_a_body_is_unpacked_no_further_than_asked(most: int) -> None:
    """Of a compressed body over the limit of the moment, nothing beyond that is looked at."""
    assert read_json(make_request(BROKEN), most) is None
    with pytest.raises(InvalidArgument, match="invalid gzip"):
        read_json(make_request(BROKEN))
    assert read_json(make_request(gzip.compress(b"{}")), max(2, most)) == b"{}"


def test_a_body_that_may_have_nothing_is_not_unpacked() -> None:
    """If nothing may be unpacked, it does not even matter whether it can be."""
    assert read_json(make_request(b"no gzip"), 0) is None
