"""The three ways to patch an object: merge, strategic merge (what Kubernetes' core types declare) and JSON patch.

Every function returns a new object and leaves its arguments alone; the result may share parts with them, so callers
treat all of it as read-only.
"""

from __future__ import annotations

from typing import Any

from scheduler.kube.port import ApiError, Object, PatchBody, PatchType

# Lists that are merged by a key; every other list (tolerations and taints too) is replaced as a whole.
MERGE_KEYS = {
    "schedulingGates": "name",
    "conditions": "type",
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "addresses": "type",
    "ownerReferences": "uid",
    "webhooks": "name",
}


def patched(before: Object, patch: PatchBody, patch_type: PatchType) -> Object:
    """Return `before` with the patch applied.

    Raises:
        ApiError: 400 for a patch of the wrong form, 422 for a JSON patch whose test or path fails.
    """
    if patch_type == "json":
        if not isinstance(patch, list):
            raise ApiError(400, "BadRequest", "a JSON patch is a list of operations")
        return _json_patched(before, patch)
    if not isinstance(patch, dict):
        raise ApiError(400, "BadRequest", f"a {patch_type} patch is an object")
    return _merged(before, patch) if patch_type == "merge" else _strategic(before, patch)


def _merged(before: Any, patch: Any) -> Any:
    """RFC 7396: maps are merged, null deletes, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    after = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = _merged(after.get(key), value)
    return after


def _strategic(before: Any, patch: Object) -> Object:
    """Merge maps; lists with a merge key are merged by it; `$patch` deletes or replaces."""
    directive = patch.get("$patch")
    if directive == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    if directive == "delete":
        return {}
    after = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if key.startswith("$"):
            raise ApiError(400, "BadRequest", f"directive {key} is not known here")
        if value is None:
            after.pop(key, None)
        elif isinstance(value, dict):
            after[key] = _strategic(after.get(key), value)
        elif isinstance(value, list) and key in MERGE_KEYS:
            after[key] = _strategic_list(after.get(key) or [], value, MERGE_KEYS[key])
            if not after[key]:
                del after[key]
        else:
            after[key] = value
    return after


def _strategic_list(before: list[Object], patch: list[Object], merge_key: str) -> list[Object]:
    """Merge lists of maps by `merge_key`; new elements go to the end."""
    after = {element.get(merge_key): element for element in before}
    for element in patch:
        if element == {"$patch": "replace"}:
            after = {}
            continue
        name = element.get(merge_key)
        if name is None:
            raise ApiError(400, "BadRequest", f"an element of the list has no {merge_key}")
        if element.get("$patch") == "delete":
            after.pop(name, None)
        else:
            after[name] = _strategic(after.get(name), element)
    return list(after.values())


def _json_patched(before: Object, operations: list[Object]) -> Object:
    """RFC 6902 without move and copy."""
    after: Any = before
    for operation in operations:
        verb, path = operation.get("op"), operation.get("path")
        if verb not in ("test", "add", "remove", "replace") or not isinstance(path, str):
            raise ApiError(400, "BadRequest", f"operation {verb} at {path} is not known here")
        keys = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
        if verb == "test":
            if _at(after, keys, path) != operation.get("value"):
                raise _refused(f"testing path {path} failed")
        else:
            after = _changed(after, keys, operation, path)
    if not isinstance(after, dict):
        raise _refused("the result is not an object")
    return after


def _refused(why: str) -> ApiError:
    return ApiError(422, "Invalid", f"the server rejected our request due to an error in our request: {why}")


def _index(keys: list[str], length: int, path: str) -> int:
    if not keys[0].isdigit() or int(keys[0]) >= length:
        raise _refused(f"path {path} does not exist")
    return int(keys[0])


def _at(value: Any, keys: list[str], path: str) -> Any:
    for depth in range(len(keys)):
        if isinstance(value, dict) and keys[depth] in value:
            value = value[keys[depth]]
        elif isinstance(value, list):
            value = value[_index(keys[depth:], len(value), path)]
        else:
            raise _refused(f"path {path} does not exist")
    return value


def _changed(value: Any, keys: list[str], operation: Object, path: str) -> Any:
    """Return a copy of `value` with one add, remove or replace done below it."""
    if not keys:
        return operation.get("value")
    if isinstance(value, dict):
        return _changed_map(value, keys, operation, path)
    if isinstance(value, list):
        return _changed_list(value, keys, operation, path)
    raise _refused(f"path {path} does not exist")


def _changed_map(value: Object, keys: list[str], operation: Object, path: str) -> Object:
    key, verb = keys[0], operation["op"]
    if key not in value and (verb != "add" or len(keys) > 1):
        raise _refused(f"path {path} does not exist")
    if len(keys) > 1:
        return {**value, key: _changed(value[key], keys[1:], operation, path)}
    if verb == "remove":
        return {name: one for name, one in value.items() if name != key}
    return {**value, key: operation.get("value")}


def _changed_list(value: list[Any], keys: list[str], operation: Object, path: str) -> list[Any]:
    verb = operation["op"]
    if len(keys) == 1 and verb == "add":
        at = len(value) if keys[0] == "-" else _index(keys, len(value) + 1, path)
        return [*value[:at], operation.get("value"), *value[at:]]
    at = _index(keys, len(value), path)
    if len(keys) > 1:
        return [*value[:at], _changed(value[at], keys[1:], operation, path), *value[at + 1 :]]
    rest = [] if verb == "remove" else [operation.get("value")]
    return [*value[:at], *rest, *value[at + 1 :]]
