"""Tables read a page at a time, in the order of their ids."""

from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import Connection, RowMapping, TextClause


def read_in_pages(
    connection: Connection,
    find_newest: TextClause,
    read_page: TextClause,
    values: Mapping[str, object],
) -> Iterator[Sequence[RowMapping]]:
    """Yield the rows that are there now, oldest first.

    `read_page` takes `values`, the id that the page comes `after`, and the `newest` id, as
    `find_newest` returns it. No transaction is open while a page is in use.
    """
    with connection.begin():
        newest = connection.scalar(find_newest)
    after = 0
    while True:
        with connection.begin():
            place = {"after": after, "newest": newest}
            page = connection.execute(read_page, {**values, **place}).mappings().all()
        if not page:
            return
        yield page
        after = page[-1]["id"]
