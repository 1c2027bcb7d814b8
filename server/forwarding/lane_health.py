"""How a lane fares, for those who look after it: in the log, in a metric, in `forward status`."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from server.forwarding.answers import quote_answer, quote_reason
from server.forwarding.providers.provider import Answer, Decision, NoAnswer, Provider

# What a request to a provider came to; the values of a metric's label.
ACCEPTED, REFUSED, BLOCKED, UNAUTHORIZED = "accepted", "refused", "blocked", "unauthorized"
THROTTLED, INCOMPLETE, FAILED, NO_ANSWER = "throttled", "incomplete", "failed", "no_answer"
OUTCOMES = (ACCEPTED, REFUSED, BLOCKED, UNAUTHORIZED, THROTTLED, INCOMPLETE, FAILED, NO_ANSWER)
# A provider that answers in one of these ways has a trouble of its own.
_TROUBLES = frozenset({THROTTLED, INCOMPLETE, FAILED, NO_ANSWER})

_LOG_SECONDS = 60.0
# A trouble is described so often at the most: it takes comparing the answer with the request.
_DESCRIBE_SECONDS = 2.0
_MAX_REASONS = 10
_OTHER_REASONS = "other reasons"

_log = logging.getLogger("productgraph.forwarder")


def name_outcome(decision: Decision, answer: Answer | NoAnswer) -> str:
    """Name what a request came to, as the metric does."""
    if isinstance(answer, NoAnswer):
        return NO_ANSWER
    if decision.stop is not None:
        return UNAUTHORIZED
    if decision.suspicion is not None:
        return BLOCKED if decision.suspicion.is_refusal else INCOMPLETE
    if answer.status == 429:
        return THROTTLED
    if decision.dead or decision.resend:
        return REFUSED
    return ACCEPTED if decision.done else FAILED


class LaneHealth:
    """What happened in a lane lately, logged at the begin, at intervals and at the end of it."""

    def __init__(
        self,
        provider: Provider,
        count_request: Callable[[str, str], None] = lambda _provider, _outcome: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._provider = provider
        self._count_request = count_request
        self._clock = clock
        # What a provider answered when it failed; None once it is well.
        self.trouble: str | None = None
        self._described_at = self._warned_at = self._refused_at = self._stopped_at = float("-inf")
        self._has_warned = False
        self._failed = self._succeeded = False
        self._refused: Counter[str] = Counter()

    def note_request(
        self, payloads: Sequence[bytes], decision: Decision, answer: Answer | NoAnswer
    ) -> None:
        """Note a request and what it came to. May take a second, for one that is large."""
        outcome = name_outcome(decision, answer)
        self._count_request(self._provider.name, outcome)
        if outcome in _TROUBLES:
            self._failed = True
            self._describe_trouble(payloads, answer)
        elif outcome in (ACCEPTED, REFUSED):
            self._succeeded = True
        self._note_refused(Counter(decision.dead.values()), payloads)

    def note_buried(self, reason: str, count: int = 1) -> None:
        """Note events that were given up; the reason is a text of our own."""
        known = reason in self._refused or len(self._refused) < _MAX_REASONS
        self._refused[reason if known else _OTHER_REASONS] += count

    def note_stop(self, reason: str) -> None:
        """Note that the lane is stopped."""
        if self._is_due(self._stopped_at):
            self._stopped_at = self._clock()
            _log.error(
                "forwarding is stopped until the settings are right",
                extra={"provider": self._provider.name, "reason": reason},
            )

    def note_resumption(self) -> None:
        """Note that a stopped lane goes on."""
        self._stopped_at = float("-inf")
        _log.info("forwarding again", extra={"provider": self._provider.name})

    def end_round(self) -> None:
        """Log what the requests since the last round came to, as far as it is time for that."""
        if self._failed:
            self._warn()
        elif self._succeeded:
            self._recover()
        self._failed = self._succeeded = False
        self.log_refused()

    def log_refused(self) -> None:
        """Log what was refused for good, unless that was done a moment ago."""
        if self._refused and self._is_due(self._refused_at):
            self._refused_at = self._clock()
            reasons = dict(self._refused.most_common())
            self._refused.clear()
            _log.warning(
                "events refused for good",
                extra={
                    "provider": self._provider.name,
                    "events": sum(reasons.values()),
                    "reasons": reasons,
                },
            )

    def _warn(self) -> None:
        if self._is_due(self._warned_at):
            self._warned_at = self._clock()
            self._has_warned = True
            _log.warning(
                "a provider fails",
                extra={"provider": self._provider.name, "answer": self.trouble},
            )

    def _recover(self) -> None:
        self.trouble = None
        self._described_at = float("-inf")
        if self._has_warned:
            self._has_warned = False
            _log.info("a provider has recovered", extra={"provider": self._provider.name})

    def _describe_trouble(self, payloads: Sequence[bytes], answer: Answer | NoAnswer) -> None:
        if self._clock() - self._described_at < _DESCRIBE_SECONDS:
            return
        self._described_at = self._clock()
        if isinstance(answer, NoAnswer):
            self.trouble = f"no answer ({answer.reason})"
        else:
            quoted = quote_answer(answer.body, payloads, self._provider.secrets)
            self.trouble = f"{answer.status} {quoted}".rstrip()

    def _note_refused(self, reasons: Counter[str], payloads: Sequence[bytes]) -> None:
        for reason, count in reasons.most_common(_MAX_REASONS):
            self.note_buried(quote_reason(reason, payloads, self._provider.secrets), count)
        if (rest := reasons.total() - sum(n for _, n in reasons.most_common(_MAX_REASONS))) > 0:
            self._refused[_OTHER_REASONS] += rest

    def _is_due(self, since: float) -> bool:
        return self._clock() - since >= _LOG_SECONDS
