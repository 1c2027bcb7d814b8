"""Amplitude's User Privacy API.

https://amplitude.com/docs/apis/analytics/user-privacy

It takes a `user_id` and deletes what Amplitude has of that user up to the day on which the job
runs, with the devices that it has merged into the user. It takes no `device_id`: who was always
anonymous cannot be deleted by it. Version 2 of the API deletes from all projects of the
organization, which is more than was asked for here.
"""

import re
from base64 import b64encode

import orjson

from server.config import AMPLITUDE, DeletionAccess
from server.events.persons import Person
from server.forwarding.providers.amplitude import name_user
from server.forwarding.providers.deletions import Ruling, read_document, read_objects
from server.forwarding.providers.provider import Answer, Request, read_text
from server.storage.provider_deletions import ACCEPTED, DONE, UNKNOWN

_REQUESTER = "productgraph"
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


class AmplitudeDeletions:
    """Deletes users from the project of an API key. A job is known by the day on which it runs."""

    name = AMPLITUDE

    def __init__(self, access: DeletionAccess) -> None:
        encoded = b64encode(f"{access.project_key}:{access.secret}".encode()).decode()
        self.secrets: tuple[str, ...] = (access.secret, encoded, access.project_key)
        self.pause_seconds = access.pause_seconds
        self._endpoint = access.endpoint
        self._headers = {"Authorization": f"Basic {encoded}", "Accept": "application/json"}

    def request_deletion(self, person: Person) -> Request | None:
        """Return the request for the person's user.id."""
        if person.user_id is None:
            return None
        body = {
            "user_ids": [name_user(person.user_id)],
            "requester": _REQUESTER,
            # Otherwise a user that is not known is a 400, as a malformed request is. The examples
            # have it as a text, and a boolean was refused: amplitude-dev-center, issue 696.
            "ignore_invalid_id": "true",
        }
        headers = self._headers | {"Content-Type": "application/json"}
        return Request(self._endpoint, headers, orjson.dumps(body))

    def read_deletion(self, person: Person, answer: Answer) -> Ruling | None:
        """Return on which day the user is deleted, or that nobody is known by that id."""
        user_id = name_user(person.user_id or "")
        for job in read_objects(read_document(answer)):
            unknown = job.get("invalid_ids")
            if isinstance(unknown, list) and user_id in map(str, unknown):
                return Ruling(UNKNOWN)
            day = read_text(job.get("day"))
            if _DAY.fullmatch(day):
                return Ruling(ACCEPTED, read_text(job.get("status")).lower(), day)
        return None

    def request_state(self, job: str) -> Request:
        """Return the request for the jobs of that day."""
        url = f"{self._endpoint}?start_day={job}&end_day={job}"
        return Request(url, self._headers, b"", "GET")

    def read_state(self, job: str, answer: Answer) -> Ruling | None:
        """Return how far the job is: `staging`, `submitted`, or done."""
        document = read_document(answer)
        if not isinstance(document, list):
            return None
        for each in read_objects(document):
            if each.get("day") == job and (status := read_text(each.get("status")).lower()):
                return Ruling(DONE if status == "done" else ACCEPTED, status)
        return Ruling(ACCEPTED, "no job on that day")
