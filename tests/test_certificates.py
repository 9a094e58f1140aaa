"""The webhook's own certificate: whom it convinces and when, and how replicas come to share one through a Secret."""

from __future__ import annotations

import asyncio
import base64
import random
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from structlog.testing import capture_logs

from scheduler.certificates import SECRET, Material, SharedCertificate, renewed, service_names
from scheduler.clock import LoopClock
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.embedded.injected import Faults
from scheduler.kube.port import ApiError, Object
from tests.virtual import virtual

SPACE = "tessera-system"
NAMES = service_names(SPACE)
HOST = "tessera-webhook.tessera-system.svc"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def convinces(material: Material, bundle: bytes, at: datetime, host: str = HOST) -> bool:
    """Say whether a client that trusts `bundle` takes the listener for `host` at that time."""
    store = Store(x509.load_pem_x509_certificates(bundle))
    verifier = PolicyBuilder().store(store).time(at).build_server_verifier(x509.DNSName(host))
    try:
        verifier.verify(x509.load_pem_x509_certificate(material.tls_crt), [])
    except VerificationError:
        return False
    return True


def authorities(material: Material) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(material.ca_crt)


def test_a_new_certificate_convinces_for_its_life_and_nobody_else() -> None:
    material = renewed(None, NAMES, NOW)
    other = renewed(None, NAMES, NOW)
    assert convinces(material, material.ca_crt, NOW - timedelta(minutes=59))
    assert convinces(material, material.ca_crt, NOW + 89 * DAY)
    assert not convinces(material, material.ca_crt, NOW + 91 * DAY)
    assert not convinces(material, other.ca_crt, NOW)
    assert not convinces(material, material.ca_crt, NOW, host="api.tessera-system.svc")
    assert convinces(material, material.ca_crt, NOW, host="localhost")


def test_it_is_renewed_at_two_thirds_of_its_life_by_the_same_authority() -> None:
    first = renewed(None, NAMES, NOW)
    assert renewed(first, NAMES, NOW + 59 * DAY) is first
    second = renewed(first, NAMES, NOW + 60 * DAY)
    assert (second.ca_crt, second.ca_key) == (first.ca_crt, first.ca_key)
    assert second.tls_crt != first.tls_crt
    assert second.tls_key != first.tls_key
    assert convinces(second, first.ca_crt, NOW + 149 * DAY)


def test_a_new_authority_stands_beside_the_old_one_until_that_expires() -> None:
    first = renewed(None, NAMES, NOW)
    late = NOW + timedelta(days=3650 * 2 // 3)
    kept = renewed(first, NAMES, late - 2 * DAY)
    assert kept.ca_crt == first.ca_crt
    second = renewed(kept, NAMES, late + DAY)
    assert authorities(second)[1:] == authorities(first)
    assert convinces(second, second.ca_crt, late + DAY)
    assert not convinces(second, first.ca_crt, late + DAY)
    assert convinces(kept, second.ca_crt, late + DAY)
    third = renewed(second, NAMES, NOW + 3651 * DAY)
    assert authorities(third) == authorities(second)[:1]


@pytest.mark.parametrize(
    "broken",
    [
        {"tls_crt": b"junk"},
        {"tls_key": b"junk"},
        {"tls_key": renewed(None, NAMES, NOW).tls_key},
        {"tls_crt": renewed(None, NAMES, NOW).tls_crt},
    ],
)
def test_a_listener_that_cannot_serve_gets_a_new_certificate(broken: dict[str, bytes]) -> None:
    good = renewed(None, NAMES, NOW)
    found = renewed(_with(good, **broken), NAMES, NOW)
    assert found.ca_crt == good.ca_crt
    assert convinces(found, good.ca_crt, NOW)


@pytest.mark.parametrize(
    "broken", [{"ca_crt": b"junk"}, {"ca_key": b"junk"}, {"ca_key": renewed(None, NAMES, NOW).ca_key}]
)
def test_an_authority_that_cannot_sign_is_replaced(broken: dict[str, bytes]) -> None:
    good = renewed(None, NAMES, NOW)
    found = renewed(_with(good, **broken), NAMES, NOW)
    assert authorities(found)[0] != authorities(good)[0]
    assert convinces(found, found.ca_crt, NOW)


def test_a_name_that_lacks_and_a_clock_far_behind_are_reasons_too() -> None:
    good = renewed(None, NAMES, NOW)
    assert renewed(good, NAMES[:2], NOW) is good
    found = renewed(good, [*NAMES, "192.0.2.1"], NOW)
    assert found.ca_crt == good.ca_crt
    assert found.tls_crt != good.tls_crt
    assert renewed(good, NAMES, NOW - DAY).ca_crt != good.ca_crt


def _with(material: Material, **parts: bytes) -> Material:
    kept = {key: getattr(material, key) for key in ("ca_crt", "ca_key", "tls_crt", "tls_key")}
    return Material(**{**kept, **parts})


@pytest.mark.parametrize("data", [None, {}, {"ca.crt": "*"}, {"ca.crt": 3}, "x", {"tls.crt": "YQ=="}])
def test_an_incomplete_secret_holds_nothing(data: object) -> None:
    assert Material.of({"data": data}) is None


class Scene:
    """A cluster with the shipped Secret and webhook configuration, and replicas."""

    def __init__(self) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        numbers = count(1)
        self.faults = Faults(random.Random(1))
        self.cluster = EmbeddedCluster(self.clock, lambda: f"{next(numbers):032x}", faults=self.faults)
        self.cluster.preload("secrets", [{"metadata": {"name": SECRET, "namespace": SPACE}, "type": "Opaque"}])

    async def configure(self, **client: str) -> None:
        hooks = [{"name": name, "clientConfig": {"url": "https://x/mutate", **client}} for name in ("a.x.y", "b.x.y")]
        await self.cluster.create(
            "mutatingwebhookconfigurations", "", {"metadata": {"name": "tessera"}, "webhooks": hooks}
        )

    def replica(self) -> SharedCertificate:
        return SharedCertificate(self.cluster, self.clock, SPACE, NAMES)

    def material(self) -> Material:
        (secret,) = self.cluster.snapshot("secrets")
        found = Material.of(secret)
        assert found is not None
        return found

    def bundles(self) -> list[bytes]:
        (found,) = self.cluster.snapshot("mutatingwebhookconfigurations")
        assert {one["clientConfig"]["url"] for one in found["webhooks"]} == {"https://x/mutate"}
        return [base64.b64decode(one["clientConfig"].get("caBundle", "")) for one in found["webhooks"]]

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.clock.wall_us() / 1e6, UTC)


@asynccontextmanager
async def scene() -> AsyncGenerator[Scene, None]:
    yield Scene()


def shown(context: ssl.SSLContext) -> bytes:
    """Return the certificate that a new connection is shown."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours, theirs = (
        client.wrap_bio(to_client, to_server),
        context.wrap_bio(to_server, to_client, server_side=True),
    )
    for end in (ours, theirs, ours, theirs):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    der = ours.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


@virtual(scene)
async def test_replicas_share_one_and_kube_apiserver_is_told(here: Scene) -> None:
    await here.configure(caBundle="b2xk")
    one, other = here.replica(), here.replica()
    assert shown(one.context) != shown(other.context)
    await asyncio.gather(one.step(), other.step())
    await asyncio.gather(one.step(), other.step())
    material = here.material()
    assert shown(one.context) == shown(other.context) == material.tls_crt
    assert here.bundles() == [material.ca_crt] * 2
    assert convinces(material, here.bundles()[0], here.now())


@virtual(scene)
async def test_it_changes_in_time_without_a_restart(here: Scene) -> None:
    await here.configure()
    replica = here.replica()
    await replica.step()
    first = here.material()
    await here.clock.sleep(59 * 86400)
    await replica.step()
    assert here.material() == first
    await here.clock.sleep(2 * 86400)
    await replica.step()
    second = here.material()
    assert shown(replica.context) == second.tls_crt != first.tls_crt
    assert here.bundles() == [first.ca_crt] * 2


@virtual(scene)
async def test_nothing_is_written_while_nothing_is_due(here: Scene) -> None:
    await here.configure()
    replica = here.replica()
    await replica.step()
    before = [*here.cluster.snapshot("secrets"), *here.cluster.snapshot("mutatingwebhookconfigurations")]
    await replica.step()
    assert before == [*here.cluster.snapshot("secrets"), *here.cluster.snapshot("mutatingwebhookconfigurations")]


@virtual(scene)
async def test_a_bundle_that_somebody_took_away_comes_back(here: Scene) -> None:
    await here.configure()
    replica = here.replica()
    await replica.step()
    stale: Object = {"webhooks": [{"name": "a.x.y", "clientConfig": {"caBundle": None}}]}
    await here.cluster.patch("mutatingwebhookconfigurations", "", "tessera", stale, patch_type="strategic")
    assert here.bundles()[0] == b""
    await replica.step()
    assert here.bundles() == [here.material().ca_crt] * 2


@virtual(scene)
async def test_without_a_secret_it_is_made_and_without_a_configuration_nobody_is_told(here: Scene) -> None:
    await here.cluster.delete("secrets", SPACE, SECRET)
    replica = here.replica()
    await replica.step()
    assert shown(replica.context) == here.material().tls_crt


@virtual(scene)
async def test_trouble_is_told_and_the_old_one_goes_on(here: Scene) -> None:
    await here.configure()
    replica = here.replica()
    await replica.step()
    before = shown(replica.context)

    async def refuse(*_: object) -> Object:
        raise ApiError(403, "Forbidden", "no")

    here.cluster.get = refuse  # type: ignore[assignment,method-assign]
    await here.clock.sleep(61 * 86400)
    with capture_logs() as logs:
        await replica.step()
    assert [one["event"] for one in logs] == ["webhook.certificate_not_shared"]
    assert shown(replica.context) == before


@virtual(scene)
async def test_alone_it_renews_for_itself(here: Scene) -> None:
    replica = SharedCertificate(None, here.clock, SPACE, [*NAMES, "0:0::7"])
    first = shown(replica.context)
    await replica.step()
    assert shown(replica.context) == first
    await here.clock.sleep(61 * 86400)
    await replica.step()
    assert shown(replica.context) != first
