"""Ids as HMACs under PRIVACY_SECRET: with it they are recognised, without it not even guessed.

A plain hash is not enough: anybody with a list of possible ids, such as addresses, could hash them.
"""

import hmac
from hashlib import sha256

from server.events.persons import Person

_USER, _ANONYMOUS, _MARK, _VALUE = b"user", b"anonymous", b"mark", b"value"
_SEAL = b"seal"
_MARK_BYTES = 8
_VALUE_CHARACTERS = 32


class Digests:
    """Makes the HMACs of ids under one secret."""

    def __init__(self, secret: str) -> None:
        self._key = sha256(secret.encode()).digest()
        # Identifies the secret, and reveals nothing about it.
        self.mark = self._digest(_MARK)[:_MARK_BYTES]

    @property
    def sealing_key(self) -> bytes:
        """Return a key of 32 bytes to encrypt under."""
        return self._digest(_SEAL)

    def of_user(self, project_id: str, user_id: str) -> bytes:
        """Return the digest of a project's user.id."""
        return self._digest(_USER, project_id.encode(), user_id.encode())

    def of_anonymous(self, project_id: str, anonymous_id: str) -> bytes:
        """Return the digest of a project's user.anonymous_id."""
        return self._digest(_ANONYMOUS, project_id.encode(), anonymous_id.encode())

    def of_person(self, person: Person) -> list[bytes]:
        """Return the digests of all ids of a person, in one order."""
        project_id, user_id = person.project_id, person.user_id
        digests = [self.of_anonymous(project_id, each) for each in person.anonymous_ids]
        if user_id is not None:
            digests.append(self.of_user(project_id, user_id))
        return sorted(digests)

    def of_value(self, text: str) -> str:
        """Return the hash that replaces a text on the way in, the same in any field."""
        return self._digest(_VALUE, text.encode(errors="replace")).hex()[:_VALUE_CHARACTERS]

    def _digest(self, *parts: bytes) -> bytes:
        # No project has a NUL, nor has an id.
        return hmac.digest(self._key, b"\0".join(parts), sha256)
