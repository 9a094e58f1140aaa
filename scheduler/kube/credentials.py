"""Where the API server is and as whom we speak to it: kubeconfig or service account, read by the official client.

Of `kubernetes` only the configuration is used (contexts, tokens, exec plugins, OIDC, certificates); requests are ours.
Importing this module takes time and memory, so `scheduler.kube.api` does it only when it connects.
"""

from __future__ import annotations

import contextlib
import ssl
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException, kube_config, load_incluster_config, load_kube_config

from scheduler.clock import Clock
from scheduler.errors import ConfigError

REFRESH_S = 60.0


class Credentials:
    """One API server's address and our identity there.

    Attributes:
        url: scheme, host, port and path prefix, without a slash at the end.
        ssl: how to verify the server and show our certificate, None for plain http.
        server_hostname: the name its certificate must carry when that is not the host's, else None.
        proxy: the proxy to go through, None for none.
    """

    def __init__(self, configuration: Configuration) -> None:
        """Take a loaded configuration."""
        self._configuration = configuration
        self._authorization: str = configuration.api_key.get("BearerToken", "")
        self.url: str = configuration.host.rstrip("/")
        if urlsplit(self.url).scheme not in {"http", "https"}:
            raise ValueError(f"the server {self.url} must begin with https:// (or http://)")
        self.ssl = _ssl_context(configuration) if self.url.startswith("https") else None
        self.server_hostname: str | None = configuration.tls_server_name or None
        self.proxy: str | None = configuration.proxy or _proxy_of_environment(self.url)

    async def authorization(self) -> str:
        """Return the Authorization header, empty for none; tokens that rotate are read again about every minute.

        A token that cannot be read again is used as it was: the server will say when it has expired.
        """
        with contextlib.suppress(ConfigException, OSError):
            self._authorization = await self._configuration.get_api_key_with_prefix("BearerToken") or ""
        return self._authorization


async def load(*, kubeconfig: str | None, in_cluster: bool, clock: Clock) -> Credentials:
    """Read the credentials.

    Args:
        kubeconfig: path of a kubeconfig; None takes $KUBECONFIG or ~/.kube/config.
        in_cluster: use the pod's service account instead.
        clock: tells when to read a token again.

    Raises:
        ConfigError: they are missing or make no sense.
    """
    configuration = Configuration()
    configuration.api_key = {}
    if not in_cluster:
        _require_file(kubeconfig)
    try:
        if in_cluster:
            load_incluster_config(client_configuration=configuration)
        else:
            await _load_kubeconfig(kubeconfig, configuration, clock)
        return Credentials(configuration)
    except (ConfigException, OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        if in_cluster:
            raise ConfigError(
                f"Cannot use the pod's service account: {why}. Outside a pod use --kubeconfig FILE; in one, see to it "
                "that automountServiceAccountToken is not false."
            ) from error
        raise ConfigError(
            f"Cannot use kubeconfig {kubeconfig or '(default)'}: {why}. See with `kubectl config view` that it has a "
            "current context with a cluster and a user."
        ) from error


def _require_file(path: str | None) -> None:
    """Raise ConfigError when a file that was named cannot be read, which the client would take for an empty one.

    Without a name one of the default files must be there.
    """
    if path is None:
        default = kube_config.KUBE_CONFIG_DEFAULT_LOCATION
        places = [place for place in default.split(kube_config.ENV_KUBECONFIG_PATH_SEPARATOR) if place]
        if not any(Path(place).expanduser().exists() for place in places):
            named = " and no ".join(places) or "file in $KUBECONFIG"
            raise ConfigError(f"There is no kubeconfig: no {named}; name one with --kubeconfig FILE.")
        return
    try:
        with Path(path).open("rb"):
            return
    except OSError as error:
        raise ConfigError(
            f"Cannot read kubeconfig {path}: {error.strerror}; name another with --kubeconfig."
        ) from error


async def _load_kubeconfig(path: str | None, configuration: Configuration, clock: Clock) -> None:
    """Load a kubeconfig and see to it that tokens from files, plugins and providers are renewed."""
    loader = await load_kube_config(config_file=path, client_configuration=configuration, persist_config=False)
    read_at = clock.monotonic()

    async def refresh(to: Configuration) -> None:
        nonlocal read_at
        if clock.monotonic() - read_at >= REFRESH_S:
            read_at = clock.monotonic()
            await loader.load_and_set(to)

    configuration.refresh_api_key_hook = refresh


def _ssl_context(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _proxy_of_environment(url: str) -> str | None:
    """Return the proxy that HTTPS_PROXY and NO_PROXY ask for."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)
