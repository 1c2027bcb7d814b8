"""The ids of a person, encrypted for as long as a provider has not taken their deletion.

A provider needs the ids themselves, which an HMAC does not give back. The key is made of
PRIVACY_SECRET, so that the database alone reveals nothing.
"""

from base64 import urlsafe_b64encode
from collections.abc import Iterator

import orjson
from cryptography.fernet import Fernet, InvalidToken

from server.events.persons import Person
from server.privacy.digests import Digests

# Of anonymous ids: what every provider takes in one request, together with a user.
_IDS_AT_ONCE = 1000


class Unsealable(Exception):
    """What was sealed cannot be read: it was sealed under another secret, or changed since."""


def seal_person(digests: Digests, person: Person) -> Iterator[bytes]:
    """Yield the ids of a person, sealed; in parts, if there are more than fit in a request."""
    fernet, user_id = _open_fernet(digests), person.user_id
    for start in range(0, len(person.anonymous_ids) or 1, _IDS_AT_ONCE):
        anonymous = person.anonymous_ids[start : start + _IDS_AT_ONCE]
        yield fernet.encrypt(orjson.dumps([person.project_id, user_id, anonymous]))
        user_id = None


def unseal_person(digests: Digests, sealed: bytes) -> Person:
    """Return the person of a part. Raises Unsealable."""
    try:
        project_id, user_id, anonymous = orjson.loads(_open_fernet(digests).decrypt(sealed))
    except InvalidToken:
        raise Unsealable from None
    return Person(project_id, user_id, tuple(anonymous))


def _open_fernet(digests: Digests) -> Fernet:
    return Fernet(urlsafe_b64encode(digests.sealing_key))
