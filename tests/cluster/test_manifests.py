"""All of k8s/ is right; the commands say so, and docs say what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.manifests import Bundle, check
from cluster.manifests.__main__ import app
from cluster.manifests.entrypoint import parse_job
from cluster.manifests.rules import RULES
from cluster.manifests.schema import ROOT, schemas_folder
from vz_ray.utils.errors import UserError

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
BASES = sorted(
    path.parent.name for path in K8S.glob("base/*/kustomization.yaml") if path.parent.name != "common"
)
DOCS = ROOT / "docs" / "kubernetes.md"


def test_the_sizes_that_docs_speak_of_are_there():
    assert {"sft-8gpu", "single-node-8gpu", "16gpu-paper", "spot", "interactive", "serve"} <= set(OVERLAYS)
    assert {"cpu-rehearsal", "kueue"} <= set(OVERLAYS)
    assert BASES == ["interactive", "rl", "serve", "sft"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_right(overlay, name):
    if schemas_folder() is None:
        pytest.skip("KubeRay's schemas are not here (VZ_RAY_CRDS names their folder)")
    assert not check(overlay(name))


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_breaks_no_rule(overlay, name):
    bundle = Bundle(overlay(name))
    assert [message for rule in RULES.values() for message in rule(bundle)] == []


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_right_beside_what_all_share(base, name):
    assert not check(base(name))


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_in_one_namespace_and_has_one_workload(overlay, name):
    manifests = overlay(name)
    assert len(Bundle(manifests).workloads) == 1
    assert {m["metadata"]["namespace"] for m in manifests if m["kind"] != "Namespace"} == {"vz-ray"}
    assert [m["metadata"]["name"] for m in manifests if m["kind"] == "Namespace"] == ["vz-ray"]


def test_rays_own_autoscaler_reads_the_groups_as_they_are_meant(overlay):
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _generate_available_node_types_from_ray_cr_spec as node_types,
    )

    [workload] = Bundle(overlay("spot")).workloads
    types = node_types(workload.cluster)
    head = types.pop("headgroup")
    assert (head["resources"]["CPU"], head["resources"]["head"], head["max_workers"]) == (0, 1, 0)
    assert "GPU" not in head["resources"]
    read = {
        name: (one["min_workers"], one["max_workers"], one["resources"].get("GPU", 0), one["resources"][name])
        for name, one in types.items()
    }
    assert read == {"learner": (1, 1, 8, 1), "rollout": (0, 16, 1, 1), "clips": (1, 2, 0, 1)}
    assert types["rollout"]["labels"] == {"ray.io/market-type": "spot"}
    ours = {group.name: group.resources["CPU"] for group in workload.workers}
    assert ours == {name: one["resources"]["CPU"] for name, one in types.items()}


def test_publishing_knows_the_label_of_spot_nodes():
    # Read rather than imported, which would bring torch.
    label = 'MARKET = "ray.io/market-type"'
    assert label in (ROOT / "vz_ray" / "rollout" / "remote.py").read_text()
    assert "ray.io/market-type: spot" in (K8S / "components/spot/rollout-on-spot.yaml").read_text()


def test_serving_is_configured_as_conf_has_it(overlay):
    [workload] = Bundle(overlay("serve")).workloads
    ours = yaml.safe_load(workload.spec["serveConfigV2"])
    theirs = yaml.safe_load((ROOT / "conf" / "serve" / "production.yaml").read_text())
    for one in (ours, theirs):
        one["applications"][0].pop("args")
    assert ours == theirs


def test_no_manifest_holds_a_secret():
    for path in K8S.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            assert not isinstance(document, dict) or document.get("kind") != "Secret", path


def test_docs_name_every_overlay_component_and_secret():
    text = DOCS.read_text()
    names = [*OVERLAYS, *(path.name for path in (K8S / "components").iterdir())]
    names += list(yaml.safe_load((K8S / "required.yaml").read_text())["secrets"])
    assert [name for name in names if f"`{name}`" not in text] == []


def test_docs_name_files_that_exist():
    text = DOCS.read_text()
    paths = set(re.findall(r"(?<![\w/.])((?:k8s|conf|cluster|docs|tests)/[\w./-]*\w)", text))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.manifests", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_checks_what_it_is_given():
    done = run("check", "k8s/overlays/sft-8gpu", "k8s/base/sft")
    assert (done.returncode, done.stdout) == (0, f"nothing to mend in 2 folders, {len(RULES)} rules\n")


def test_the_command_says_what_is_to_mend(tmp_path: Path):
    (tmp_path / "k8s").symlink_to(K8S)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(
        "kind: Kustomization\nresources: [../k8s/overlays/sft-8gpu]\npatches:\n  - target: {kind: RayJob}\n"
        "    patch: '- {op: replace, path: /spec/rayClusterSpec/rayVersion, value: 2.59.0}'\n"
    )
    done = run("check", str(folder))
    assert done.returncode == 1
    assert "[versions-agree] RayJob vz-ray-sft: rayVersion is 2.59.0" in done.stdout
    assert f"1 findings in 1 folders, {len(RULES)} rules" in done.stdout


def test_an_error_of_a_kustomization_is_one_line():
    done = run("render", "k8s")
    assert done.returncode == 2
    assert (
        done.stderr
        == "manifests: k8s/kustomization.yaml is missing: give a folder that has a kustomization.yaml\n"
    )


def test_what_is_rendered_is_yaml_that_reads_back(overlay, capsys):
    app(["render", str(K8S / "overlays" / "sft-8gpu")], standalone_mode=False)
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == overlay("sft-8gpu")


def test_rules_are_listed(capsys):
    app(["rules"], standalone_mode=False)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(RULES)


@pytest.mark.parametrize(
    ("entrypoint", "words"),
    [
        ("", "is no command; write `vz-ray` and one of train, sft, eval, quickstart"),
        ("python train.py", "'python train.py' is no command"),
        ("vz-ray train name=a", "it names 0 config files"),
        ("vz-ray train conf/tiny.yaml conf/quickstart.yaml", "it names 2 config files"),
        ("vz-ray train conf/tiny.yaml train.task=3", "unknown key train.task"),
        ("vz-ray train conf/tiny.yaml train.batch_size=many", "train.batch_size"),
        ("vz-ray train conf/quickstart.yaml", "unknown key"),
        ("vz-ray sft conf/videozoomer-7b-sft.yaml sft.batch_size=0", "must be at least 1"),
    ],
)
def test_an_entrypoint_that_would_end_at_once_is_refused(entrypoint, words):
    with pytest.raises(UserError) as caught:
        parse_job(entrypoint)
    assert words in str(caught.value)


def test_an_entrypoints_config_is_the_one_that_would_run():
    found = parse_job("vz-ray quickstart conf/quickstart.yaml --name x train.batch_size=4")
    assert (found.config.name, found.config.train.tasks, found.named) == ("x", 4, True)
    assert found.groups == ("learner", "rollout", "clips")
    assert not parse_job("vz-ray sft conf/videozoomer-7b-sft.yaml").named
