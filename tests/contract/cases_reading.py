"""Contract: lists in pages, watches, bookmarks, 410."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from scheduler.kube.port import Cluster, Gone, NotFound
from tests.contract.making import (
    all_of,
    binding,
    create_pod,
    everything,
    fresh_name,
    name_of,
    node,
    now,
    pod,
    seen,
    version_of,
)


async def test_a_list_comes_in_pages_in_the_order_of_names(cluster: Cluster) -> None:
    names = sorted(fresh_name("page") for _ in range(7))
    for name in reversed(names):
        await create_pod(cluster, pod(name))
    first = await cluster.list("pods", limit=2)
    assert len(first.items) == 2
    assert first.next
    whole = [name_of(one) for one in (await everything(cluster, "pods", limit=2))[0]]
    assert [name for name in whole if name in names] == names


async def test_all_pages_show_one_moment(cluster: Cluster) -> None:
    names = [fresh_name("moment") for _ in range(4)]
    for name in names:
        await create_pod(cluster, pod(name))
    page = await cluster.list("pods", limit=1)
    late = fresh_name("zz-late")
    await create_pod(cluster, pod(late))
    await cluster.delete("pods", "default", max(names))
    items, versions = list(page.items), {page.resource_version}
    while page.next:
        page = await cluster.list("pods", limit=1, after=page.next)
        items += page.items
        versions.add(page.resource_version)
    found = {name_of(one) for one in items}
    assert set(names) <= found
    assert late not in found
    assert len(versions) == 1


async def test_the_last_page_says_so(cluster: Cluster) -> None:
    await create_pod(cluster)
    assert (await cluster.list("pods", limit=5000)).next == ""


async def test_a_page_token_that_aged_is_gone(cluster: Cluster, compact: Callable[[], Awaitable[None]]) -> None:
    for _ in range(3):
        await create_pod(cluster)
    page = await cluster.list("pods", limit=1)
    await create_pod(cluster)
    await compact()
    with pytest.raises(Gone) as refused:
        await cluster.list("pods", limit=1, after=page.next)
    assert refused.value.status == 410


async def test_a_watch_from_the_forgotten_past_is_gone(
    cluster: Cluster, compact: Callable[[], Awaitable[None]]
) -> None:
    await create_pod(cluster)
    await compact()
    with pytest.raises(Gone):
        await all_of(cluster.watch("pods", "1", timeout_s=3))


async def test_a_watch_tells_what_happened_in_order(cluster: Cluster) -> None:
    since, name = await now(cluster, "pods"), fresh_name("watched")
    made = await create_pod(cluster, pod(name))
    await cluster.patch("pods", "default", name, {"metadata": {"annotations": {"a": "1"}}})
    await cluster.bind("default", name, binding(made, "somewhere"))
    await cluster.delete("pods", "default", name, grace_s=0)
    events = await seen(cluster, "pods", since, names={name}, until=5)
    assert [event.type for event in events] == ["ADDED", "MODIFIED", "MODIFIED", "MODIFIED", "DELETED"]
    assert events[1].object["metadata"]["annotations"]["a"] == "1"
    assert events[2].object["spec"]["nodeName"] == "somewhere"
    versions = [int(version_of(event.object)) for event in events]
    assert versions == sorted(set(versions))
    assert versions[0] > int(since)


async def test_a_watch_begins_after_its_resource_version(cluster: Cluster) -> None:
    name = fresh_name("after")
    made = await create_pod(cluster, pod(name))
    await cluster.patch("pods", "default", name, {"metadata": {"annotations": {"a": "1"}}})
    events = await seen(cluster, "pods", version_of(made), names={name}, until=1)
    assert events[0].type == "MODIFIED"


async def test_a_watch_of_one_kind_does_not_tell_of_another(cluster: Cluster) -> None:
    since, name = await now(cluster, "nodes"), fresh_name("shared-name")
    await create_pod(cluster, pod(name))
    await cluster.create("nodes", "", node(name))
    events = await seen(cluster, "nodes", since, names={name}, until=1)
    assert events[0].object["kind"] == "Node"


async def test_a_watch_ends_by_itself_and_bookmarks_where_it_is(cluster: Cluster) -> None:
    since, made = await now(cluster, "pods"), []

    async def create_some() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(16):
            await asyncio.wait([loop.create_future()], timeout=0.25)
            made.append(name_of(await create_pod(cluster)))

    creating = asyncio.create_task(create_some())
    events = await all_of(cluster.watch("pods", since, timeout_s=5))
    await creating
    marks = [at for at, event in enumerate(events) if event.type == "BOOKMARK"]
    assert marks
    before = [name_of(event.object) for event in events[: marks[-1]] if event.type == "ADDED"]
    assert before
    mark = version_of(events[marks[-1]].object)
    assert all(int(version_of(event.object)) <= int(mark) for event in events[: marks[-1]])
    rest = made[made.index(before[-1]) + 1 :]
    later = await seen(cluster, "pods", mark, names=set(made), until=len(rest))
    assert [name_of(event.object) for event in later] == rest


async def test_what_is_not_there_is_not_found(cluster: Cluster) -> None:
    for kind, namespace in (("pods", "default"), ("nodes", ""), ("leases", "default")):
        with pytest.raises(NotFound):
            await cluster.get(kind, namespace, fresh_name("absent"))  # type: ignore[arg-type]


async def test_what_a_caller_does_to_an_answer_changes_nothing(cluster: Cluster) -> None:
    body = pod()
    made = await create_pod(cluster, body)
    body["spec"]["containers"][0]["image"] = "changed"
    made["metadata"]["labels"]["app"] = "changed"
    kept = await cluster.get("pods", "default", name_of(made))
    assert kept["spec"]["containers"][0]["image"] == "pause:3.10"
    assert kept["metadata"]["labels"]["app"] == "kept"
