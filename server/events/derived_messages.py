"""Messages that are parsed from the bytes of another one, with some fields of other types."""

from collections.abc import Callable

from google.protobuf import timestamp_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass


def derive_message(
    message_type: type[Message], package: str, change: Callable[[FieldDescriptorProto], None]
) -> type[Message]:
    """Return a message with the fields of another one, each changed by `change`, in a package."""
    times = timestamp_pb2.DESCRIPTOR
    file = FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3", dependency=[times.name]
    )
    message_type.DESCRIPTOR.CopyToProto(file.message_type.add())
    [message] = file.message_type
    message.ClearField("options")
    for field in message.field:
        field.ClearField("options")
        change(field)
    pool = DescriptorPool()
    pool.AddSerializedFile(times.serialized_pb)
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"{package}.{message.name}"))
