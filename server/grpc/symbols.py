"""What reflection finds by a name."""

from typing import Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool


class SymbolPool:
    """A pool of descriptors that knows the file of a method, too.

    `grpcurl describe` and `ghz --call` ask for the file of a method, which DescriptorPool finds for
    services, messages and fields alone.
    """

    def __init__(self, pool: DescriptorPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        """Look up everything else in the pool itself."""
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, name: str) -> FileDescriptor:  # noqa: N802 - the pool's own
        """Return the file that defines a symbol. Raises KeyError if there is none."""
        try:
            return self._pool.FindFileContainingSymbol(name)
        except KeyError:
            return self._pool.FindMethodByName(name).containing_service.file
