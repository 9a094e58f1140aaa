"""What `deploy/` ships, read as kustomize reads it, and put through the API server's strictest checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bench.apiclient import APPLY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bench.apiclient import ApiClient, Json

BASE = Path(__file__).resolve().parent.parent / "deploy" / "kustomize" / "base"


def read_base(folder: Path = BASE) -> list[Json]:
    """Return every object of the kustomize base, in its order."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [document for name in listed for document in yaml.safe_load_all((folder / name).read_text())]


def pick(documents: Iterable[Json], kind: str, name: str) -> Json:
    """Return the one object of this kind and name.

    Raises:
        LookupError: there is none.
    """
    for document in documents:
        if document["kind"] == kind and document["metadata"]["name"] == name:
            return document
    raise LookupError(f"deploy/ has no {kind} {name}")


def kube_scheduler_config(
    kubeconfig: Path,
    *,
    extender_url: str | None,
    percentage: int | None,
    leader_election: bool,
    extra: Mapping[str, object] | None = None,
) -> Json:
    """Return the shipped KubeSchedulerConfiguration with only the place-bound parts replaced.

    Args:
        kubeconfig: whom kube-scheduler acts as.
        extender_url: urlPrefix of the extender; None drops the extender: a plain kube-scheduler.
        percentage: percentageOfNodesToScore of the profile; None drops it: Kubernetes' default sampling.
        leader_election: whether it takes the shipped Lease first.
        extra: top-level keys that replace the shipped ones.
    """
    config: Json = yaml.safe_load(pick(read_base(), "ConfigMap", "kube-scheduler")["data"]["config.yaml"])
    config["clientConnection"]["kubeconfig"] = str(kubeconfig)
    config["leaderElection"]["leaderElect"] = leader_election
    if extender_url is None:
        del config["extenders"]
    else:
        config["extenders"][0]["urlPrefix"] = extender_url
    profile = config["profiles"][0]
    if percentage is None:
        del profile["percentageOfNodesToScore"]
    else:
        profile["percentageOfNodesToScore"] = percentage
    return {**config, **(extra or {})}


async def apply(api: ApiClient, documents: Iterable[Json]) -> None:
    """Apply objects server-side; an unknown or doubled field is an error.

    Raises:
        ApiError: the API server refused one.
    """
    kinds: dict[str, dict[str, Json]] = {}
    for document in documents:
        group = document["apiVersion"]
        root = f"/api/{group}" if "/" not in group else f"/apis/{group}"
        if group not in kinds:
            resources = (await api.get(root))["resources"]
            kinds[group] = {one["kind"]: one for one in resources if "/" not in one["name"]}
        resource, meta = kinds[group][document["kind"]], document["metadata"]
        scope = f"/namespaces/{meta['namespace']}" if resource["namespaced"] else ""
        path = f"{root}{scope}/{resource['name']}/{meta['name']}"
        query = "?fieldManager=tessera-bench&force=true&fieldValidation=Strict"
        await api.patch(path + query, document, content_type=APPLY)
