"""What the kubelet says it gave to containers: the List call of pod-resources v1, over its unix socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from nodeagent.attribution import Grant, Holder

POD_RESOURCES = Path("pod-resources/kubelet.sock")
DEVICE_PLUGINS = Path("device-plugins")
_LIST = "/v1.PodResourcesLister/List"
_ANSWER_BYTES_MAX = 16 << 20
# The part of k8s.io/kubelet/pkg/apis/podresources/v1 that we read: message -> field -> (number, repeated, type).
_MESSAGES: dict[str, dict[str, tuple[int, bool, str]]] = {
    "ListPodResourcesRequest": {},
    "ContainerDevices": {"resource_name": (1, False, ""), "device_ids": (2, True, "")},
    "ContainerResources": {"name": (1, False, ""), "devices": (2, True, "ContainerDevices")},
    "PodResources": {
        "name": (1, False, ""),
        "namespace": (2, False, ""),
        "containers": (3, True, "ContainerResources"),
    },
    "ListPodResourcesResponse": {"pod_resources": (1, True, "PodResources")},
}


class KubeletError(Exception):
    """The kubelet's pod-resources socket is not there or did not answer."""


def messages() -> dict[str, Any]:
    """Return the classes of the wire's messages by name."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tessera/podresources.proto", package="v1", syntax="proto3")
    for name, members in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for member, (number, repeated, kind) in members.items():
            message.field.add(
                name=member,
                number=number,
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
                type=kinds.TYPE_MESSAGE if kind else kinds.TYPE_STRING,
                type_name=f".v1.{kind}" if kind else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"v1.{name}")) for name in _MESSAGES}


def grants_of(pods: Iterable[Any]) -> list[Grant]:
    """Return one grant for each container and resource: the kubelet lists every device id as an entry of its own."""
    ids: dict[tuple[Holder, str], list[str]] = {}
    for pod in pods:
        for container in pod.containers:
            for devices in container.devices:
                key = Holder(pod.namespace, pod.name, container.name), devices.resource_name
                ids.setdefault(key, []).extend(devices.device_ids)
    return [Grant(holder, resource, tuple(sorted(found))) for (holder, resource), found in ids.items()]


class PodResources:
    """One kept connection to the kubelet."""

    def __init__(self, kubelet: Path = Path("/var/lib/kubelet"), *, timeout_s: float = 2.0) -> None:
        """Connect when first asked; a kubelet that restarts is connected again."""
        self.socket = kubelet / POD_RESOURCES
        self._timeout_s = timeout_s
        kinds = messages()
        self._request: bytes = kinds["ListPodResourcesRequest"]().SerializeToString()
        self._read: Callable[[bytes], Any] = kinds["ListPodResourcesResponse"].FromString
        self._channel: Any = None
        self._list: Any = None

    def list(self) -> list[Grant]:
        """Return what containers were given. Raises KubeletError with what to do."""
        if not self.socket.is_socket():
            self.close()
            raise KubeletError(f"{self.socket} is not there; mount the host's /var/lib/kubelet/pod-resources.")
        if self._channel is None:
            options = [("grpc.max_receive_message_length", _ANSWER_BYTES_MAX), ("grpc.use_local_subchannel_pool", 1)]
            self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=options)
            self._list = self._channel.unary_unary(_LIST)
        try:
            answer = self._list(self._request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            self.close()
            raise KubeletError(f"{self.socket} did not answer ({error.code().name}); is the kubelet running?") from None
        return grants_of(self._read(answer).pod_resources)

    def close(self) -> None:
        """Let go of the connection."""
        if self._channel is not None:
            self._channel.close()
        self._channel = self._list = None
