"""The rules of texts, applied to all texts of an event at once."""

from collections.abc import Sequence

from productgraph.v1 import rules_pb2
from server.events.schema import Kind, Schema


class TextRules:
    """The rules of one schema; `fields` are those that have some, the project's first."""

    def __init__(self, schema: Schema) -> None:
        ruled = [f for f in schema.of_kind(Kind.TEXT) if f.rules != rules_pb2.FieldRules()]
        ruled.sort(key=lambda field: (not field.rules.matches_api_key, not field.rules.required))
        self.fields = tuple(ruled)
        self._required_count = sum(field.rules.required for field in ruled)
        self._shortest_limit = min(f.rules.max_bytes for f in ruled if f.rules.max_bytes)
        self._choices = [
            (place, frozenset(field.rules.allowed_values))
            for place, field in enumerate(ruled)
            if field.rules.allowed_values
        ]

    def are_plainly_kept(self, texts: Sequence[str], project_id: str) -> bool:
        """Check the texts of `fields` by a few operations in C; those that fail may be valid."""
        if texts[0] != project_id or "" in texts[: self._required_count]:
            return False
        for place, allowed in self._choices:
            if texts[place] not in allowed:
                return False
        # Together they keep the shortest limit, so each does.
        return len("".join(texts).encode()) <= self._shortest_limit
