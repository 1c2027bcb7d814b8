"""HTTP servers that stand in for Amplitude's and Mixpanel's APIs that delete persons.

Each insists on the documented form of a request: method, path, credentials, body and limits.
"""

import base64
import re
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import orjson

from server.config import DeletionAccess
from tests.support.provider_servers import HTML, Fault, Reply, Script, StandIn

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_AMPLITUDE_KEYS = {"user_ids", "amplitude_ids", "requester", "ignore_invalid_id"}


class Asked(NamedTuple):
    """A request as it came; `at` is of `time.monotonic`."""

    method: str
    path: str
    document: Any
    at: float
    status: int


class DeletionServer(StandIn):
    """What a provider takes deletions by, for one project."""

    path: str
    max_bytes = 100_000

    def __init__(self, project_key: str = "project-key", secret: str = "deletion-s3cret") -> None:
        self.project_key = project_key
        self.secret = secret
        self.asked: list[Asked] = []
        # The ids that are to be deleted, by jobs.
        self.jobs: dict[str, list[str]] = {}
        self.state = ""
        super().__init__()

    @property
    def url(self) -> str:
        """The whole URL that deletions are asked of."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def deleted(self) -> set[str]:
        """The ids that are to be deleted."""
        return {each for ids in self.jobs.values() for each in ids}

    def access(self, pause_seconds: float = 0.0) -> DeletionAccess:
        """Return how it is reached."""
        return DeletionAccess(self.url, self.project_key, self.secret, pause_seconds)

    def take(
        self, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[Reply, Fault | None]:
        """Take a deletion."""
        return self._take("POST", path, headers, body)

    def take_get(self, path: str, headers: Mapping[str, str]) -> tuple[Reply, Fault | None]:
        """Take a question how far a job is."""
        return self._take("GET", path, headers, b"")

    def refuse_unread(self) -> Reply:
        """Return the answer to a body that is too large to be read."""
        return self._refuse(413, "too large")

    def _take(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[Reply, Fault | None]:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = None
        with self._lock:
            script = self.scripts.popleft() if self.scripts else Script()
            reply = script.reply or self._answer(method, path, headers, document)
            self.asked.append(Asked(method, path, document, time.monotonic(), reply.status))
        return reply, script.fault

    def _answer(self, method: str, path: str, headers: Mapping[str, str], document: Any) -> Reply:
        place, _, query = path.partition("?")
        options = {name: values[0] for name, values in parse_qs(query).items()}
        if not place.startswith(self.path):
            return Reply(404, HTML)
        if headers.get("Authorization") != self._authorization:
            return self._refuse(401, "Unauthorized")
        if method == "GET":
            return self._tell(place.removeprefix(self.path), options)
        if place != self.path or headers.get("Content-Type") != "application/json":
            return self._refuse(400, "Bad Request")
        problem = self._find_problem(document, options)
        return self._refuse(400, problem) if problem else self._accept(document)

    @staticmethod
    def _refuse(status: int, error: str) -> Reply:
        return Reply(status, orjson.dumps({"status": "error", "error": error}))

    @property
    @abstractmethod
    def _authorization(self) -> str: ...

    @abstractmethod
    def _find_problem(self, document: Any, options: Mapping[str, str]) -> str | None: ...

    @abstractmethod
    def _accept(self, document: Any) -> Reply: ...

    @abstractmethod
    def _tell(self, job: str, options: Mapping[str, str]) -> Reply: ...


class AmplitudeDeletionServer(DeletionServer):
    """Amplitude's User Privacy API; it knows nobody of `unknown`."""

    path = "/api/2/deletions/users"
    day = "2031-02-28"
    unknown: frozenset[str] = frozenset()

    @property
    def _authorization(self) -> str:
        encoded = base64.b64encode(f"{self.project_key}:{self.secret}".encode()).decode()
        return f"Basic {encoded}"

    def _find_problem(self, document: Any, options: Mapping[str, str]) -> str | None:
        if not isinstance(document, dict) or options or document.keys() - _AMPLITUDE_KEYS:
            return "malformed"
        users = document.get("user_ids")
        if not isinstance(users, list) or not 1 <= len(users) <= 100:
            return "user_ids must be a list of 1 to 100"
        if not all(isinstance(user, str) and user for user in users):
            return "user_ids must be texts"
        if not isinstance(document.get("requester"), str):
            return "requester is missing"
        if document.get("ignore_invalid_id", "false") not in ("true", "false"):
            return "ignore_invalid_id must be a text"
        if self.unknown.intersection(users) and document.get("ignore_invalid_id") != "true":
            return f"invalid ids {users}"
        return None

    def _accept(self, document: Any) -> Reply:
        known = [user for user in document["user_ids"] if user not in self.unknown]
        self.jobs.setdefault(self.day, []).extend(known)
        about = {"requested_on_day": "2031-02-14", "requester": document["requester"]}
        ids = [{"amplitude_id": 10**9 + n} | about for n, _ in enumerate(known)]
        report = {"day": self.day, "status": "staging", "amplitude_ids": ids}
        lacking = [user for user in document["user_ids"] if user in self.unknown]
        return Reply(200, orjson.dumps(report | ({"invalid_ids": lacking} if lacking else {})))

    def _tell(self, job: str, options: Mapping[str, str]) -> Reply:
        start, end = (options.get(name, "") for name in ("start_day", "end_day"))
        if job or not (_DAY.fullmatch(start) and _DAY.fullmatch(end) and start <= end):
            return self._refuse(400, "start_day and end_day are wanted")
        found = [day for day in self.jobs if start <= day <= end]
        return Reply(200, orjson.dumps([{"day": d, "status": self.state} for d in found]))


class MixpanelDeletionServer(DeletionServer):
    """Mixpanel's GDPR API."""

    path = "/api/app/data-deletions/v3.0/"

    @property
    def _authorization(self) -> str:
        return f"Bearer {self.secret}"

    def _find_problem(self, document: Any, options: Mapping[str, str]) -> str | None:
        if options != {"token": self.project_key}:
            return "token is wrong"
        if not isinstance(document, dict) or document.keys() - {"distinct_ids", "compliance_type"}:
            return "malformed"
        if document.get("compliance_type") not in ("GDPR", "CCPA"):
            return "compliance_type must be GDPR or CCPA"
        ids = document.get("distinct_ids")
        if not isinstance(ids, list) or not 1 <= len(ids) <= 1999:
            return "distinct_ids must be a list of 1 to 1999"
        if not all(isinstance(each, str) and each for each in ids):
            return "distinct_ids must be texts"
        return None

    def _accept(self, document: Any) -> Reply:
        number = str(1583792934719392965 + len(self.jobs))
        self.jobs[number] = document["distinct_ids"]
        task: dict[str, Any] = {
            "status": "PENDING",
            "tracking_id": number,
            "compliance_type": "gdpr",
        }
        task |= {"project_id": 1978118, "distinct_id_count": len(self.jobs[number])}
        return Reply(200, orjson.dumps({"status": "ok", "results": [task]}))

    def _tell(self, job: str, options: Mapping[str, str]) -> Reply:
        if options != {"token": self.project_key}:
            return self._refuse(400, "token is wrong")
        state = self.state if job in self.jobs else "NOT_FOUND"
        results = {"status": state, "result": "", "distinct_ids": self.jobs.get(job, [])}
        return Reply(200, orjson.dumps({"status": "ok", "results": results}))
