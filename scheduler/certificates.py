"""The webhook's certificate when nobody gives one: made here, renewed in time, shared by replicas through one Secret.

Invariant: what is served was signed by a CA that the Secret holds, and every CA of the Secret that has not expired is
in the webhook configuration, so kube-apiserver trusts a new certificate before and after each renewal.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import ssl
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from scheduler.clock import Clock
from scheduler.kube.port import ApiError, Cluster, Conflict, NotFound, Object, UnknownOutcome

log = structlog.get_logger(__name__)

SECRET = "tessera-webhook"  # noqa: S105 - its name
CONFIGURATION = "tessera"
SERVICE = "tessera-webhook"
CA_LIFE, LEAF_LIFE = timedelta(days=3650), timedelta(days=90)
SKEW = timedelta(hours=1)
"""How far the clocks of API servers may be behind ours."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CAS_MAX = 4
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Material:
    """Certificates and keys in PEM, under the keys that they have in the Secret.

    Attributes:
        ca_crt: the CAs, the one that signs first.
        ca_key: its key.
        tls_crt: the listener's certificate.
        tls_key: its key.
    """

    ca_crt: bytes
    ca_key: bytes
    tls_crt: bytes
    tls_key: bytes

    @classmethod
    def of(cls, secret: Mapping[str, object]) -> Material | None:
        """Return what a Secret holds, None when it is incomplete."""
        found = secret.get("data")
        kept = found if isinstance(found, dict) else {}
        try:
            parts = [base64.b64decode(kept.get(key, ""), validate=True) for key in _KEYS]
        except (binascii.Error, TypeError, ValueError):
            return None
        return cls(*parts) if all(parts) else None

    def encoded(self) -> dict[str, str]:
        """Return the Secret's data."""
        parts = (self.ca_crt, self.ca_key, self.tls_crt, self.tls_key)
        return {key: base64.b64encode(part).decode() for key, part in zip(_KEYS, parts, strict=True)}


_KEYS = ("ca.crt", "ca.key", "tls.crt", "tls.key")


def service_names(namespace: str) -> tuple[str, ...]:
    """Return the names by which kube-apiserver knows the webhook's Service, and those of this machine."""
    return (f"{SERVICE}.{namespace}.svc", f"{SERVICE}.{namespace}.svc.cluster.local", *LOOPBACK)


def renewed(old: Material | None, names: Collection[str], now: datetime) -> Material:
    """Return what to use now: the old one as long as nothing of it is due.

    A certificate is due after two thirds of its life, when it lacks a name, or when it cannot be used. A new CA stands
    before the ones that were there, which stay until they expire.

    Args:
        old: what was used until now, if anything.
        names: DNS names and IP addresses of the listener.
        now: with a time zone.
    """
    authorities, ca_key = _authority_of(old, now)
    if ca_key is None:
        ca_key, fresh = _new_authority(now)
        authorities = [fresh, *authorities][:CAS_MAX]
    elif old is not None and _serves(old, authorities[0], names, now):
        return old
    key, leaf = _new_leaf(authorities[0], ca_key, names, now)
    bundle = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in authorities)
    return Material(bundle, _pem(ca_key), leaf.public_bytes(serialization.Encoding.PEM), _pem(key))


def _authority_of(
    old: Material | None, now: datetime
) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey | None]:
    """Return the CAs that have not expired, and the first one's key unless a new CA is due."""
    if old is None:
        return [], None
    try:
        every = x509.load_pem_x509_certificates(old.ca_crt)
        key = _read_key(old.ca_key)
    except (ValueError, TypeError):
        return [], None
    alive = [one for one in every if now < one.not_valid_after_utc]
    usable = every[0] in alive and key.public_key() == every[0].public_key() and not _due(every[0], now)
    return alive, key if usable else None


def _serves(material: Material, authority: x509.Certificate, names: Collection[str], now: datetime) -> bool:
    """Say whether the listener's certificate may go on."""
    try:
        leaf = x509.load_pem_x509_certificate(material.tls_crt)
        key = _read_key(material.tls_key)
        leaf.verify_directly_issued_by(authority)
        listed = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    found = {str(one.value) for one in listed}
    return key.public_key() == leaf.public_key() and set(names) <= found and not _due(leaf, now)


def _due(certificate: x509.Certificate, now: datetime) -> bool:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not begin <= now < begin + (end - begin) * 2 / 3


def _new_authority(now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tessera-webhook-ca {now:%Y-%m-%d}")])
    usage = _usage(signs_certificates=True)
    made = (
        _begun(name, name, key, now, CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key, made.sign(key, hashes.SHA256())


def _new_leaf(
    authority: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, names: Collection[str], now: datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVICE)])
    made = (
        _begun(name, authority.subject, key, now, LEAF_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(one) for one in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    return key, made.sign(ca_key, hashes.SHA256())


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now - SKEW + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Return a key. Raises ValueError or TypeError."""
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("a key of another kind than ours")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


class SharedCertificate:
    """The listener's TLS context, with a certificate that all replicas share.

    Attributes:
        context: takes a renewed certificate for the connections that come after.
    """

    def __init__(self, cluster: Cluster | None, clock: Clock, namespace: str, names: Collection[str]) -> None:
        """Make a certificate of our own, which nobody trusts before the first `step`.

        Args:
            cluster: holds the Secret and the webhook configuration; None keeps all to ourselves.
            clock: tells what is due.
            namespace: of the Secret.
            names: DNS names and IP addresses of the listener.
        """
        self._cluster, self._clock, self._namespace = cluster, clock, namespace
        self._names = tuple(str(_general(one).value) for one in names)  # addresses as certificates show them
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.set_alpn_protocols(["http/1.1"])
        self._used = renewed(None, self._names, self._now())
        self._load()

    async def step(self) -> None:
        """Take or renew the shared certificate and tell kube-apiserver whom to trust; trouble is told and waits."""
        try:
            material = await self._agree()
            if self._cluster is not None:
                await self._announce(self._cluster, material.ca_crt)
        except (ApiError, UnknownOutcome, TimeoutError) as error:
            log.warning("webhook.certificate_not_shared", error=str(error), secret=f"{self._namespace}/{SECRET}")
            return
        if material != self._used:
            self._used = material
            self._load()
            log.info("webhook.certificate", secret=f"{self._namespace}/{SECRET}")

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall_us() // 1_000_000, UTC)

    def _load(self) -> None:
        """Put the certificate into the context; `ssl` reads files only."""
        with tempfile.TemporaryDirectory() as folder:  # 0700
            cert, key = Path(folder, "tls.crt"), Path(folder, "tls.key")
            cert.write_bytes(self._used.tls_crt)
            key.write_bytes(self._used.tls_key)
            self.context.load_cert_chain(cert, key)

    async def _agree(self) -> Material:
        """Return the Secret's certificate, renewed when it is due; of two replicas that renew at once the first wins.

        Raises:
            ApiError, UnknownOutcome: the API server refuses, or does not say.
        """
        if self._cluster is None:
            return renewed(self._used, self._names, self._now())
        for _ in range(_ROUNDS):
            try:
                secret = await self._cluster.get("secrets", self._namespace, SECRET)
                found = Material.of(secret)
                wanted = renewed(found or self._used, self._names, self._now())
                if wanted == found:
                    return wanted
                await self._cluster.replace("secrets", self._namespace, SECRET, {**secret, "data": wanted.encoded()})
            except NotFound:
                wanted = renewed(self._used, self._names, self._now())
                fresh: Object = {"metadata": {"name": SECRET, "namespace": self._namespace}, "data": wanted.encoded()}
                await self._cluster.create("secrets", self._namespace, fresh)
            except Conflict:
                continue
            return wanted
        raise Conflict(409, "Conflict", f"Secret {self._namespace}/{SECRET} is fought over; see who else writes it")

    async def _announce(self, cluster: Cluster, bundle: bytes) -> None:
        """Write the CAs into every webhook of the configuration that has others; without one there is nothing to do."""
        try:
            found = await cluster.get("mutatingwebhookconfigurations", "", CONFIGURATION)
        except NotFound:
            return
        encoded = base64.b64encode(bundle).decode()
        stale = [
            {"name": one["name"], "clientConfig": {"caBundle": encoded}}
            for one in found.get("webhooks") or ()
            if one.get("clientConfig", {}).get("caBundle") != encoded
        ]
        if stale:
            await cluster.patch(
                "mutatingwebhookconfigurations", "", CONFIGURATION, {"webhooks": stale}, patch_type="strategic"
            )
