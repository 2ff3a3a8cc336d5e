"""The small renderer: against a result written by hand, and against the real one where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.manifests.check import check_folders
from cluster.manifests.kustomize import identity, installed, render
from cluster.manifests.schema import ROOT
from vz_ray.utils.errors import UserError

HEAD = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
REAL = installed()
FOLDERS = sorted(path.parent for path in (ROOT / "k8s").glob("*/*/kustomization.yaml"))
RENDERED = [folder for folder in FOLDERS if folder.parent.name != "components"]

needs_real = pytest.mark.skipif(not REAL, reason="neither kustomize nor kubectl is installed")

CLUSTER = """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: one}
spec:
  headGroupSpec:
    template:
      spec:
        containers:
          - {name: a, image: "app:1", env: &env [{name: A, value: "1"}]}
        securityContext: &user {runAsUser: 1, runAsNonRoot: true}
  workerGroupSpecs:
    - groupName: w
      template:
        spec:
          containers: [{name: b, image: "app:1", env: *env}]
          securityContext:
            <<: *user
            runAsUser: 2
---
apiVersion: v1
kind: Namespace
metadata: {name: base}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: account}
"""
OVERLAY = """
namespace: other
resources: [../base]
components: [../component]
images:
  - {name: app, newName: registry.example.org/app, newTag: "2"}
patches:
  - patch: |-
      apiVersion: ray.io/v1
      kind: RayCluster
      metadata: {name: one}
      spec: {headGroupSpec: {template: {spec: {securityContext: {runAsUser: 5, runAsNonRoot: null}}}}}
"""
COMPONENT = """
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
patches:
  - target: {kind: RayCluster, name: on.}
    path: more.yaml
"""
MORE = """
- {op: test, path: /spec/workerGroupSpecs/0/groupName, value: w}
- {op: add, path: /spec/workerGroupSpecs/0/template/spec/containers/0/env/-, value: {name: B, value: "2"}}
"""
ONE, TWO = {"name": "A", "value": "1"}, {"name": "B", "value": "2"}
IMAGE = "registry.example.org/app:2"
EXPECTED = [
    {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "one", "namespace": "other"},
        "spec": {
            "headGroupSpec": {
                "template": {
                    "spec": {
                        "containers": [{"name": "a", "image": IMAGE, "env": [ONE]}],
                        "securityContext": {"runAsUser": 5},
                    }
                }
            },
            "workerGroupSpecs": [
                {
                    "groupName": "w",
                    "template": {
                        "spec": {
                            "containers": [{"name": "b", "image": IMAGE, "env": [ONE, TWO]}],
                            "securityContext": {"runAsUser": 2, "runAsNonRoot": True},
                        }
                    },
                }
            ],
        },
    },
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}},
    {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "account", "namespace": "other"},
    },
]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def example(tmp_path: Path) -> Path:
    write(
        tmp_path,
        {
            "base/kustomization.yaml": f"{HEAD}resources: [all.yaml]\n",
            "base/all.yaml": CLUSTER,
            "component/kustomization.yaml": COMPONENT,
            "component/more.yaml": MORE,
            "overlay/kustomization.yaml": HEAD + OVERLAY,
        },
    )
    return tmp_path / "overlay"


def by_name(manifests):
    return {identity(manifest): manifest for manifest in manifests}


def test_namespace_images_components_patches_and_anchors_give_what_was_worked_out_by_hand(example: Path):
    assert render(example) == EXPECTED


@needs_real
def test_the_real_kustomize_makes_the_same_of_the_example(example: Path):
    assert by_name(render(example, REAL)) == by_name(EXPECTED)


@needs_real
@pytest.mark.parametrize("folder", RENDERED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_the_real_kustomize_makes_the_same_of_every_folder(folder: Path):
    assert by_name(render(folder, REAL)) == by_name(render(folder))


@needs_real
def test_a_difference_from_the_real_one_is_a_finding(example: Path, monkeypatch: pytest.MonkeyPatch):
    from cluster.manifests import kustomize

    monkeypatch.setattr(kustomize, "_retag", lambda node, image: None)
    found = [str(finding) for finding in check_folders([example]) if finding.rule == "kustomize"]
    assert found == ["[kustomize] RayCluster one is not what kustomize makes of it"]


def test_every_component_is_used_or_offered_and_applies_to_a_base(tmp_path: Path):
    components = [folder for folder in FOLDERS if folder.parent.name == "components"]
    assert {folder.name for folder in components} == {"kueue", "monitoring", "spot"}
    k8s = ROOT / "k8s"
    # Kustomize wants relative paths, below which everything lies.
    (tmp_path / "k8s").symlink_to(k8s)
    for component in components:
        folder = tmp_path / component.name
        text = f"{HEAD}resources: [../k8s/base/rl]\ncomponents: [../k8s/components/{component.name}]\n"
        write(folder, {"kustomization.yaml": text})
        assert render(folder) != render(k8s / "base" / "rl")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is missing: give a folder that has a kustomization.yaml"),
        ({"kustomization.yaml": f"{HEAD}namePrefix: a-\n"}, "namePrefix is not supported here"),
        ({"kustomization.yaml": f"{HEAD}resource: [a.yaml]\n"}, "resource is not supported here"),
        ({"kustomization.yaml": "kind: Component\n"}, "is a Component"),
        ({"kustomization.yaml": "kind: Pod\n"}, "kind is 'Pod'"),
        ({"kustomization.yaml": f"{HEAD}resources: [a.yaml]\n"}, "cannot read"),
        (
            {"kustomization.yaml": f"{HEAD}resources: [../a.yaml]\n", "../a.yaml": "kind: Pod\n"},
            "is not below",
        ),
        ({"kustomization.yaml": f"{HEAD}resources: [.]\n"}, "includes itself"),
        ({"kustomization.yaml": f"{HEAD}resources: [a.yaml]\n", "a.yaml": "a: [\n"}, "is not YAML"),
        ({"kustomization.yaml": f"{HEAD}resources: [a.yaml]\n", "a.yaml": "- 1\n"}, "a manifest is a map"),
        (
            {"kustomization.yaml": f"{HEAD}resources: [a.yaml]\n", "a.yaml": f"{CLUSTER}---{CLUSTER}"},
            "RayCluster one is there twice",
        ),
        (
            {
                "kustomization.yaml": f"{HEAD}resources: [a.yaml]\npatches:\n"
                "  - target: {kind: RayJob, name: two}\n    patch: '[]'\n",
                "a.yaml": CLUSTER,
            },
            "no object is RayJob two; there are RayCluster one",
        ),
        (
            {"kustomization.yaml": f"{HEAD}patches:\n  - target: {{labelSelector: a=b}}\n    patch: '[]'\n"},
            "target.labelSelector is not supported here",
        ),
        ({"kustomization.yaml": f"{HEAD}patches:\n  - patch: '[]'\n"}, "a JSON patch needs a target"),
        (
            {"kustomization.yaml": f"{HEAD}patches:\n  - target: {{kind: A}}\n    patch: '[{{op: a}}]'\n"},
            "begins with '[' and is not JSON",
        ),
        ({"kustomization.yaml": f"{HEAD}patches:\n  - target: {{kind: A}}\n"}, "give either path or patch"),
        (
            {"kustomization.yaml": f"{HEAD}images:\n  - {{name: a, digest: b}}\n"},
            "images: digest is not supported",
        ),
    ],
)
def test_what_is_not_known_or_does_not_fit_is_refused_by_name(tmp_path: Path, files, words):
    folder = write(tmp_path / "one", files)
    with pytest.raises(UserError) as caught:
        render(folder)
    assert words in str(caught.value)


@needs_real
def test_what_the_real_kustomize_refuses_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="kustomiz"):
        render(tmp_path, REAL)
