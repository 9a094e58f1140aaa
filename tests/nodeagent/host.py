"""A host around make-believe GPUs: /proc, container logs, and a kubelet that answers."""

from __future__ import annotations

import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from nodeagent.agent import Places
from nodeagent.kubelet import messages


class Kubelet:
    """The pod-resources service of a kubelet, as the real one lists: each device id an entry of its own."""

    def __init__(self, folder: Path) -> None:
        self._kinds, self.pods = messages(), []  # type: ignore[var-annotated]
        (folder / "pod-resources").mkdir(parents=True)
        (folder / "device-plugins").mkdir()
        self.folder = folder
        self.serve()

    def serve(self) -> None:
        """Start, as a kubelet does that was away."""
        handler = grpc.unary_unary_rpc_method_handler(
            self._answer, self._kinds["ListPodResourcesRequest"].FromString, lambda message: message.SerializeToString()
        )
        service = grpc.method_handlers_generic_handler("v1.PodResourcesLister", {"List": handler})
        self._server = grpc.server(ThreadPoolExecutor(1))
        self._server.add_generic_rpc_handlers((service,))
        self._server.add_insecure_port(f"unix:{self.folder}/pod-resources/kubelet.sock")
        self._server.start()

    def _answer(self, _request: Any, _context: grpc.ServicerContext) -> Any:
        return self._kinds["ListPodResourcesResponse"](pod_resources=self.pods)

    def give(self, pod: str, *ids: str, resource: str = "nvidia.com/gpu", namespace: str = "ml") -> None:
        entries = [{"resource_name": resource, "device_ids": [one]} for one in ids]
        self.pods.append({"name": pod, "namespace": namespace, "containers": [{"name": "main", "devices": entries}]})

    def plug(self, name: str) -> None:
        """Leave a device plugin's socket in the folder."""
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(self.folder / "device-plugins" / name))
        made.close()

    def stop(self) -> None:
        self._server.stop(0).wait(5)


class Host:
    """Files of a host, and its kubelet."""

    def __init__(self, folder: Path, boot_id: Path) -> None:
        self.places = Places(folder / "proc", folder / "sys", folder / "kubelet", folder / "containers")
        boot = self.places.proc / "sys/kernel/random"
        boot.mkdir(parents=True)
        (boot / "boot_id").symlink_to(boot_id)
        self.places.logs.mkdir()
        self.start(1, "0::/init.scope")
        self.kubelet = Kubelet(self.places.kubelet)

    def start(self, pid: int, cgroup: str) -> None:
        folder = self.places.proc / str(pid)
        folder.mkdir(parents=True)
        (folder / "cgroup").write_text(cgroup)
        (folder / "stat").write_text(f"{pid} (x) S {' 0' * 18} 1 0 0")

    def run(self, pid: int, pod: str, namespace: str = "ml") -> None:
        """Start a process of a pod's container `main`."""
        uid, container = uuid.uuid5(uuid.NAMESPACE_OID, pod), f"{uuid.uuid5(uuid.NAMESPACE_URL, pod).hex:0>64}"
        self.start(pid, f"0::/kubepods/burstable/pod{uid}/{container}")
        (self.places.logs / f"{pod}_{namespace}_main-{container}.log").touch()

    @property
    def arguments(self) -> list[str]:
        places = self.places
        named = {"--proc": places.proc, "--sys": places.sys, "--kubelet": places.kubelet, "--logs": places.logs}
        return [str(word) for pair in named.items() for word in pair]
