"""A real control plane on loopback: etcd, kube-apiserver, kube-scheduler and, when asked, kube-controller-manager.

It starts in seconds, has its own CA and users, and runs under what `deploy/` ships: these very manifests are applied,
and Tessera and kube-scheduler act as the service accounts they name, with exactly the rights they grant. There is no
kubelet: nodes and pods' phases are written by `bench.kube_objects`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import trustme

from bench.apiclient import ApiClient
from bench.child import Child
from bench.kube_binaries import UnavailableError, find_binaries, find_etcd
from bench.kube_objects import pod_object
from bench.manifests import apply, kube_scheduler_config, read_base
from scheduler.clock import RealClock

ADMIN = "admin"
TESSERA = "tessera"
KUBE_SCHEDULER = "kube-scheduler"
KUBE_CONTROLLER_MANAGER = "kube-controller-manager"
DEVELOPER = "developer"
KUBELET = "kubelet"

LOOPBACK = "127.0.0.1"
START_S = 60.0
CLOCK = RealClock()
_POLL_S = 0.05
_ACCOUNT_GROUPS = ("system:serviceaccounts", "system:serviceaccounts:tessera-system", "system:authenticated")
_USERS: dict[str, tuple[str, tuple[str, ...]]] = {
    ADMIN: ("admin", ("system:masters",)),
    TESSERA: ("system:serviceaccount:tessera-system:tessera", _ACCOUNT_GROUPS),
    KUBE_SCHEDULER: ("system:serviceaccount:tessera-system:kube-scheduler", _ACCOUNT_GROUPS),
    KUBE_CONTROLLER_MANAGER: ("system:kube-controller-manager", ("system:authenticated",)),
    DEVELOPER: ("developer", ("system:authenticated",)),  # without any right of its own
    KUBELET: ("system:node:gpu-00001", ("system:nodes", "system:authenticated")),
}


class RealCluster:
    """One control plane and its users; `async with` starts and stops it.

    Attributes:
        folder: its state, keys, kubeconfigs and logs; a temporary one that `stop` removes, unless it was given.
        url: the API server's address.
        ca_file: the CA that signed its certificate.
        audit_log: one JSON object a line for each write of the user that is audited.
        etcd, api_server, kube_scheduler, controller_manager: the running programs, None while stopped.
    """

    def __init__(
        self, folder: Path | None = None, *, controller_manager: bool = False, audit_writes_of: str = ""
    ) -> None:
        """Choose ports; nothing is started yet.

        Args:
            folder: an existing folder that is kept; by default a temporary one.
            controller_manager: start kube-controller-manager too (token Secrets, garbage collection, Jobs).
            audit_writes_of: a user whose writes, Events apart, kube-apiserver notes in `audit_log`; nobody by default.

        Raises:
            UnavailableError: binaries are missing and cannot be built.
        """
        self._binaries = find_binaries()
        self._etcd_binary = find_etcd()
        self._temporary = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="tessera-cluster-"))
        self._with_controller_manager = controller_manager
        self._audited = audit_writes_of
        self.audit_log = self.folder / "audit.log"
        ports = free_ports(4)
        self._etcd_port, self._peer_port, self._api_port, self._controller_port = ports
        self._tokens = {user: secrets.token_hex(16) for user in _USERS}
        self.url = f"https://{LOOPBACK}:{self._api_port}"
        self.ca_file = self.folder / "ca.crt"
        self.etcd: Child | None = None
        self.api_server: Child | None = None
        self.kube_scheduler: Child | None = None
        self.controller_manager: Child | None = None

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        await self.stop()

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return the kubeconfig of a user, such as `ADMIN` or `TESSERA`."""
        return self.folder / f"{user}.kubeconfig"

    def client(self, user: str = ADMIN, *, token: str | None = None) -> ApiClient:
        """Return a client to open with `async with`, acting as a user or with a token of its own."""
        return ApiClient(self.url, token or self._tokens[user], self.ca_file)

    async def start(self) -> None:
        """Start etcd and kube-apiserver, apply `deploy/`, and wait until admission policies act.

        Raises:
            UnavailableError: a program ended or was not ready within a minute; its log's end is in the text. What was
                started is stopped again.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        self._write_identities()
        await self.start_etcd()
        await self.start_api_server()
        async with self.client() as api:
            await _until(lambda: _exists(api, "/api/v1/namespaces/kube-system"), "kube-apiserver", self.api_server)
            await _until(lambda: _exists(api, "/api/v1/namespaces/default"), "kube-apiserver", self.api_server)
            await apply(api, read_base())
            await _until(lambda: _policy_acts(api), "admission policy V1", self.api_server)
            await _until(lambda: _exists(api, "/apis/tessera.dev/v1alpha1/queues"), "CRD of queues", self.api_server)
        if self._with_controller_manager:
            await self.start_controller_manager()

    async def stop(self) -> None:
        """Stop everything, kube-apiserver before etcd (without etcd it hangs on SIGTERM), and remove the folder."""
        await self.stop_kube_scheduler()
        await self.stop_controller_manager()
        await self.stop_api_server()
        await self.stop_etcd()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def start_etcd(self) -> None:
        """Start etcd on the state it has; not synced to disk, so it survives restarts but no power loss."""
        client, peer = f"http://{LOOPBACK}:{self._etcd_port}", f"http://{LOOPBACK}:{self._peer_port}"
        self.etcd = self._child(
            "etcd",
            self._etcd_binary,
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--quota-backend-bytes=8589934592",
        )
        await _until(lambda: _answers(f"{client}/health"), "etcd", self.etcd)

    async def stop_etcd(self) -> None:
        """Stop etcd; stop kube-apiserver first."""
        if self.etcd:
            await self.etcd.stop()
            self.etcd = None

    async def start_api_server(self) -> None:
        """Start kube-apiserver and wait for /readyz."""
        self.api_server = self._child(
            "kube-apiserver",
            self._binaries / "kube-apiserver",
            f"--etcd-servers=http://{LOOPBACK}:{self._etcd_port}",
            f"--secure-port={self._api_port}",
            f"--bind-address={LOOPBACK}",
            f"--advertise-address={LOOPBACK}",
            f"--tls-cert-file={self.folder / 'apiserver.crt'}",
            f"--tls-private-key-file={self.folder / 'apiserver.key'}",
            f"--client-ca-file={self.ca_file}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            f"--service-account-key-file={self.folder / 'accounts.key'}",
            f"--service-account-signing-key-file={self.folder / 'accounts.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged=true",
            # No controller makes default accounts, and none takes the not-ready taint off paper nodes.
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
            "--endpoint-reconciler-type=none",
            "--max-requests-inflight=2000",
            "--max-mutating-requests-inflight=1000",
            "--profiling=false",
            *self._audit_flags(),
        )
        await _until(lambda: _answers(f"{self.url}/readyz"), "kube-apiserver", self.api_server)

    def _audit_flags(self) -> list[str]:
        """Return the flags that note one user's writes, and nothing else, without their bodies."""
        if not self._audited:
            return []
        events = [{"group": group, "resources": ["events"]} for group in ("", "events.k8s.io")]
        writes = ["create", "update", "patch", "delete", "deletecollection"]
        rules = [
            {"level": "None", "resources": events},
            {"level": "Metadata", "users": [_USERS[self._audited][0]], "verbs": writes},
            {"level": "None"},
        ]
        policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": rules}
        path = self.folder / "audit-policy.json"
        path.write_text(json.dumps(policy))
        return [f"--audit-policy-file={path}", f"--audit-log-path={self.audit_log}"]

    async def stop_api_server(self) -> None:
        """Stop kube-apiserver; its state stays in etcd and its address stays the same."""
        if self.api_server:
            await self.api_server.stop()
            self.api_server = None

    async def start_kube_scheduler(
        self,
        extender_url: str | None,
        percentage: int | None = 100,
        extra_config: Mapping[str, object] | None = None,
        *,
        leader_election: bool = False,
        kubeconfig: Path | None = None,
    ) -> None:
        """Start the profile `tessera` and wait until kube-scheduler's caches are filled.

        Args:
            extender_url: such as `http://127.0.0.1:8888/scheduler`; None starts a plain one, for comparison.
            percentage: percentageOfNodesToScore; None leaves it to Kubernetes' default sampling.
            extra_config: top-level keys that replace those of the shipped configuration.
            leader_election: take the shipped Lease first, as in production.
            kubeconfig: whom it acts as; its own account by default.

        Raises:
            UnavailableError: one is running already, or it did not become ready.
        """
        if self.kube_scheduler:
            raise UnavailableError("kube-scheduler runs already; stop it first.")
        acting_as = kubeconfig or self.kubeconfig(KUBE_SCHEDULER)
        config = kube_scheduler_config(
            acting_as,
            extender_url=extender_url,
            percentage=percentage,
            leader_election=leader_election,
            extra=extra_config,
        )
        config_file = self.folder / "kube-scheduler.json"
        config_file.write_text(json.dumps(config))
        (port,) = free_ports(1)
        self.kube_scheduler = self._child(
            "kube-scheduler",
            self._binaries / "kube-scheduler",
            f"--config={config_file}",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={port}",
            f"--authentication-kubeconfig={acting_as}",
            f"--authorization-kubeconfig={acting_as}",
            "--authentication-tolerate-lookup-failure=true",
        )
        await _until(lambda: _answers(f"https://{LOOPBACK}:{port}/readyz"), "kube-scheduler", self.kube_scheduler)

    async def stop_kube_scheduler(self, *, kill: bool = False) -> None:
        """Stop kube-scheduler, or SIGKILL it; nothing happens when it does not run."""
        child, self.kube_scheduler = self.kube_scheduler, None
        if child:
            await (child.kill() if kill else child.stop())

    async def start_controller_manager(self) -> None:
        """Start kube-controller-manager without the node life cycle, which would taint nodes that have no kubelet."""
        mine = self.kubeconfig(KUBE_CONTROLLER_MANAGER)
        self.controller_manager = self._child(
            "kube-controller-manager",
            self._binaries / "kube-controller-manager",
            f"--kubeconfig={mine}",
            f"--authentication-kubeconfig={mine}",
            f"--authorization-kubeconfig={mine}",
            "--authentication-tolerate-lookup-failure=true",
            "--leader-elect=false",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={self._controller_port}",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self.folder / 'accounts.key'}",
            f"--root-ca-file={self.ca_file}",
            "--controllers=*,-nodeipam,-nodelifecycle,-cloud-node-lifecycle-controller",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        )
        healthz = f"https://{LOOPBACK}:{self._controller_port}/healthz"
        await _until(lambda: _answers(healthz), "kube-controller-manager", self.controller_manager)

    async def stop_controller_manager(self) -> None:
        """Stop kube-controller-manager; nothing happens when it does not run."""
        child, self.controller_manager = self.controller_manager, None
        if child:
            await child.stop()

    def write_kubeconfig(self, name: str, token: str) -> Path:
        """Write a kubeconfig `NAME.kubeconfig` that acts with a token; return its path."""
        path = self.folder / f"{name}.kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self.ca_file)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "real", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "real", "context": {"cluster": "real", "user": name}}],
            "current-context": "real",
        }
        path.write_text(json.dumps(config))  # JSON is YAML
        return path

    def _write_identities(self) -> None:
        """Write the CA, the server's certificate, the key that signs account tokens, users and kubeconfigs."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca_file))
        server = authority.issue_cert(LOOPBACK)
        server.private_key_and_cert_chain_pem.write_to_path(str(self.folder / "apiserver.crt"))
        server.private_key_pem.write_to_path(str(self.folder / "apiserver.key"))
        authority.issue_cert("accounts").private_key_pem.write_to_path(str(self.folder / "accounts.key"))
        rows = []
        for user, (name, groups) in _USERS.items():
            rows.append(f'{self._tokens[user]},{name},{user},"{",".join(groups)}"\n')
            self.write_kubeconfig(user, self._tokens[user])
        (self.folder / "tokens.csv").write_text("".join(rows))

    def _child(self, name: str, binary: Path, *flags: str) -> Child:
        return Child(name, [str(binary), *flags], self.folder / f"{name}.log")


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


async def _until(ready: Callable[[], Awaitable[bool]], what: str, child: Child | None) -> None:
    """Poll until ready.

    Raises:
        UnavailableError: the program ended, or a minute passed.
    """
    assert child is not None
    deadline = time.monotonic() + START_S
    while not await ready():
        if not child.alive:
            raise UnavailableError(f"{what} ended while starting; the end of {child.log}:\n{child.tail()}")
        if time.monotonic() > deadline:
            raise UnavailableError(f"{what} not ready after {START_S:.0f} s; the end of {child.log}:\n{child.tail()}")
        await CLOCK.sleep(_POLL_S)


async def _answers(url: str) -> bool:
    """Say whether a health endpoint answers 200; whose certificate it shows does not matter here."""
    try:
        async with aiohttp.ClientSession() as session, session.get(url, ssl=False) as http:
            return http.status == 200
    except aiohttp.ClientError:
        return False


async def _exists(api: ApiClient, path: str) -> bool:
    return (await api.ask("GET", path)).status == 200


async def _policy_acts(api: ApiClient) -> bool:
    """Say whether a forged allocation is refused; a policy acts about a second after it was created."""
    forged = pod_object("forged", annotations={"tessera.dev/allocation": "{}"})
    reply = await api.ask("POST", "/api/v1/namespaces/default/pods?dryRun=All", forged)
    return reply.status == 422
