"""Patches, against results written by hand."""

from __future__ import annotations

import pytest

from cluster.manifests.patches import apply, merge
from vz_ray.utils.errors import UserError


def test_a_merge_lays_maps_over_maps_deletes_with_null_and_leaves_the_rest():
    target = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]}
    merged = merge(target, {"b": {"c": 4, "d": None, "f": {"g": 5}}}, lists=False, at="x")
    assert merged == {"a": 1, "b": {"c": 4, "f": {"g": 5}}, "e": [1, 2]}
    assert target["b"] == {"c": 2, "d": 3}


def test_a_list_replaces_in_custom_resources_and_is_refused_in_other_kinds():
    assert merge({"e": [1, 2]}, {"e": [3]}, lists=True, at="x") == {"e": [3]}
    with pytest.raises(UserError, match=r"x: e: this patch holds a list.*JSON patch"):
        merge({"e": [1, 2]}, {"e": [3]}, lists=False, at="x")


def test_directives_of_merges_are_refused():
    with pytest.raises(UserError, match=r"\$patch is not supported"):
        merge({"a": {}}, {"a": {"$patch": "delete"}}, lists=True, at="x")


def test_json_patches_add_replace_remove_and_test_in_turn():
    target = {"a": [1, 2, 3], "m/n": {"o~p": 0}}
    patched = apply(
        target,
        [
            {"op": "test", "path": "/a/0", "value": 1},
            {"op": "remove", "path": "/a/1"},
            {"op": "add", "path": "/a/1", "value": 9},
            {"op": "add", "path": "/a/-", "value": {"b": 4}},
            {"op": "replace", "path": "/m~1n/o~0p", "value": 7},
            {"op": "add", "path": "/new", "value": None},
        ],
        at="x",
    )
    assert patched == {"a": [1, 9, 3, {"b": 4}], "m/n": {"o~p": 7}, "new": None}
    assert target == {"a": [1, 2, 3], "m/n": {"o~p": 0}}


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ({"op": "test", "path": "/a/0", "value": 2}, "/a/0 is 1, and the patch was written for 2"),
        ({"op": "replace", "path": "/b", "value": 2}, "nothing is at /b to replace"),
        ({"op": "remove", "path": "/a/5"}, "'5' is no place in a list of 1"),
        ({"op": "add", "path": "/b/c", "value": 2}, "/b/c has no 'b'"),
        ({"op": "add", "path": "/a/0/c", "value": 2}, "there is a int where a map or list is needed"),
        ({"op": "add", "path": "a", "value": 2}, "must begin with '/'"),
        ({"op": "copy", "path": "/a", "value": 2}, "is not an operation"),
        ({"op": "add", "path": "/a"}, "is not an operation"),
        ({"op": "add", "path": "/a", "value": 1, "form": 2}, "is not an operation"),
    ],
)
def test_a_json_patch_that_does_not_fit_says_where(operation, words):
    with pytest.raises(UserError) as caught:
        apply({"a": [1]}, [operation], at="overlay: patches[0]")
    assert words in str(caught.value)
    assert str(caught.value).startswith("overlay: patches[0]")
