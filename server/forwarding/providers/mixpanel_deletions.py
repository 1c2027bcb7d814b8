"""Mixpanel's GDPR API.

https://docs.mixpanel.com/reference/gdpr-api

It takes the `distinct_id`s by which events were sent, and deletes their events and profiles within
30 days. Its page and its OpenAPI description differ in how an answer names the task.
"""

import re
from urllib.parse import quote

import orjson

from server.config import MIXPANEL, DeletionAccess
from server.events.persons import Person
from server.forwarding.providers.deletions import Ruling, read_document, read_objects
from server.forwarding.providers.mixpanel import name_device, name_user
from server.forwarding.providers.provider import Answer, Request, read_text
from server.storage.provider_deletions import ACCEPTED, DONE, FAILED

_TASK = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)
_STATES = {"SUCCESS": DONE, "FAILURE": FAILED, "REVOKED": FAILED}


class MixpanelDeletions:
    """Deletes users and devices from the project of a token. A job is a task there."""

    name = MIXPANEL

    def __init__(self, access: DeletionAccess) -> None:
        self.secrets: tuple[str, ...] = (access.secret, access.project_key)
        self.pause_seconds = access.pause_seconds
        self._endpoint = access.endpoint.rstrip("/")
        self._query = f"?token={quote(access.project_key, safe='')}"
        self._headers = {"Authorization": f"Bearer {access.secret}", "Accept": "application/json"}

    def request_deletion(self, person: Person) -> Request | None:
        """Return the request for the person's user.id and anonymous ids."""
        users = () if person.user_id is None else (name_user(person.user_id),)
        ids = [*users, *map(name_device, person.anonymous_ids)]
        body = orjson.dumps({"compliance_type": "GDPR", "distinct_ids": ids})
        headers = self._headers | {"Content-Type": "application/json"}
        return Request(f"{self._endpoint}/{self._query}", headers, body)

    def read_deletion(self, person: Person, answer: Answer) -> Ruling | None:  # noqa: ARG002 - Mixpanel tells of no ids
        """Return the task that deletes the person."""
        document = read_document(answer)
        if not isinstance(document, dict) or document.get("status") != "ok":
            return None
        for task in read_objects(document.get("results")):
            number = read_text(task.get("tracking_id") or task.get("task_id"))
            if _TASK.fullmatch(number):
                return Ruling(ACCEPTED, read_text(task.get("status")).lower(), number)
        return None

    def request_state(self, job: str) -> Request:
        """Return the request for the task."""
        return Request(f"{self._endpoint}/{job}{self._query}", self._headers, b"", "GET")

    def read_state(self, job: str, answer: Answer) -> Ruling | None:  # noqa: ARG002 - only asked for this one
        """Return how far the task is: `pending`, `staging`, `started`, or at an end."""
        document = read_document(answer)
        results = document.get("results") if isinstance(document, dict) else None
        for task in read_objects(results):
            if status := read_text(task.get("status")):
                return Ruling(_STATES.get(status, ACCEPTED), status.lower())
        return None
