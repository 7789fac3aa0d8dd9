"""The cluster files in deploy/: they parse, have what their readers need, and agree with the code they start.

Nothing here talks to Kubernetes or a cloud. What is checked is what goes wrong first: commands and options that do not
exist, ranks that no group of nodes can hold, volumes and keys that are named differently here and there.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytron.config import PretrainConfig
from tests.test_recipes import understood

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
IMAGE = "registry.example.com/raytron:latest"
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGT]i?)?")
MOST_FIELDS = {  # of KubeRay 1.5's RayClusterSpec and its groups, what these files use or might
    "cluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"}
    | {"workerGroupSpecs", "gcsFaultToleranceOptions", "suspend", "headServiceAnnotations"},
    "head": {"rayStartParams", "template", "serviceType", "enableIngress", "resources", "labels"},
    "worker": {
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "rayStartParams",
        "template",
        "idleTimeoutSeconds",
    }
    | {"numOfHosts", "resources", "labels", "suspend"},
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def ray_cluster(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec" if document["kind"] == "RayJob" else "rayClusterConfig"]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def gpus(group: dict[str, Any]) -> int:
    return int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])


JOB, CLAIM = documents("rayjob.yaml")
(SERVICE,) = documents("rayservice.yaml")
MANIFESTS = pytest.mark.parametrize("document", [JOB, SERVICE], ids=["rayjob", "rayservice"])


@MANIFESTS
def test_what_kuberay_requires_is_there(document: dict[str, Any]):
    assert document["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document["metadata"]["name"])
    cluster = ray_cluster(document)
    assert cluster.keys() <= MOST_FIELDS["cluster"]
    assert cluster["headGroupSpec"].keys() <= MOST_FIELDS["head"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"].keys() <= {"version", "idleTimeoutSeconds", "upscalingMode", "resources"}
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    assert len(set(names)) == len(names)
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= MOST_FIELDS["worker"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@MANIFESTS
def test_pods_are_well_formed(document: dict[str, Any]):
    for pod in pods(ray_cluster(document)):
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert pod["restartPolicy"] == "Never"  # a pod that came back would be another Ray node under the same name
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for kind in ("requests", "limits"):
            amounts = container["resources"][kind]
            assert all(isinstance(value, str) and QUANTITY.fullmatch(value) for value in amounts.values())


@MANIFESTS
def test_what_outlives_the_pods_is_on_the_one_shared_volume(document: dict[str, Any]):
    for pod in pods(ray_cluster(document)):
        (volume,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
        (container,) = pod["containers"]
        assert {"name": volume["name"], "mountPath": "/shared"}.items() <= next(
            mount.items() for mount in container["volumeMounts"] if mount["name"] == volume["name"]
        )
    assert (CLAIM["kind"], CLAIM["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])


def test_the_job_asks_for_ranks_that_its_nodes_hold():
    config = understood(shlex.split(JOB["spec"]["entrypoint"]))
    assert isinstance(config, PretrainConfig)
    groups = ray_cluster(JOB)["workerGroupSpecs"]
    fewest, most = (sum(gpus(g) * g[bound] for g in groups) for bound in ("minReplicas", "maxReplicas"))
    assert config.scaling.use_gpu
    assert config.scaling.bounds == (fewest, most)
    assert all(gpus(group) % config.parallel.tp == 0 for group in groups)
    assert config.run.failure_config.max_failures == -1  # on spot nodes losing one is nothing to count
    paths = (config.run.storage_path, config.data.path, config.data.tokenizer)
    assert all(path.startswith("/shared/") for path in paths)
    assert JOB["spec"]["shutdownAfterJobFinishes"]


def test_a_spot_pod_tells_ray_before_it_ends():
    import ray.scripts.scripts as ray_cli

    (spot,) = [group for group in ray_cluster(JOB)["workerGroupSpecs"] if group["groupName"] == "spot"]
    pod = spot["template"]["spec"]
    (container,) = pod["containers"]
    *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
    assert shell == ["/bin/bash", "-c"]
    drain, rest = script.split(";")
    program, command, *options = shlex.split(drain)
    assert (program, command) == ("ray", "drain-node")
    said = ray_cli.drain_node.make_context(command, options).params  # fails for an option that is not there
    assert said["address"] == "$FQ_RAY_IP:6379"
    assert shlex.split(rest) == ["sleep", str(said["deadline_remaining_seconds"])]
    assert said["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]


def test_the_service_is_an_application_that_serve_can_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from raytron.models.arch import DecoderConfig
    from raytron.serving.app import from_args

    schema = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(import_module(module), name) is from_args
    (model,) = application.args["models"]
    assert model["engine"]["path"].startswith("/shared/")
    monkeypatch.setenv("RAYTRON_API_KEYS", "one,two")
    monkeypatch.setenv("RAYTRON_ADMIN_KEY", "three")
    small = DecoderConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=260
    )
    (tmp_path / "config.json").write_text(json.dumps(small.to_hf()))
    args = application.args | {"models": [model | {"engine": model["engine"] | {"path": str(tmp_path)}}]}
    assert isinstance(from_args(args), serve.Application)
    for wrong, says in (
        ({"model": []}, "unknown key 'model'"),
        ({"models": [model | {"replica": {}}]}, "unknown key 'replica'"),
        ({"models": [model | {"http": {"port": 1}}]}, "beside models"),
        ({"models": []}, "at least one"),
        (args | {"http": {"admin_key": "one"}}, "must not be one of"),  # so the keys of the environment are in force
    ):
        with pytest.raises(ValueError, match=says):
            from_args(wrong)


def test_the_service_has_nodes_for_its_engines_and_keys_for_its_users():
    (model,) = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"][0]["args"]["models"]
    (group,) = ray_cluster(SERVICE)["workerGroupSpecs"]
    ranks = model["engine"]["tp"] * model["engine"].get("pp", 1)
    assert model["replicas"]["use_gpu"]
    assert gpus(group) % ranks == 0
    assert gpus(group) // ranks * group["maxReplicas"] == model["replicas"]["max_replicas"]
    for pod in pods(ray_cluster(SERVICE)):
        secrets = {one["name"]: one["valueFrom"]["secretKeyRef"]["name"] for one in pod["containers"][0]["env"]}
        assert secrets == {"RAYTRON_API_KEYS": "raytron-keys", "RAYTRON_ADMIN_KEY": "raytron-keys"}


def test_the_cluster_launcher_takes_its_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0  # the driver's, not the ranks'
    workers = [one for name, one in types.items() if name != config["head_node_type"]]
    assert sum(one["max_workers"] for one in workers) == config["max_workers"]
    header = (DEPLOY / "cluster.yaml").read_text().partition("\ncluster_name")[0]
    (job,) = re.findall(r"ray job submit (.*?)\n#\n", header.replace("\\\n#", ""), re.DOTALL)
    asked = understood(shlex.split(job))
    gpus_of = {name: one["resources"]["GPU"] * one["max_workers"] for name, one in types.items() if name != "head"}
    assert asked.scaling.bounds == (gpus_of["steady"], sum(gpus_of.values()))
    assert config["docker"]["image"] == IMAGE


def test_every_file_runs_the_ray_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [line for line in project["dependencies"] if line.startswith("ray[")]
    lowest = re.search(r">=([\d.]+)", needed)[1]
    docker = (DEPLOY / "Dockerfile").read_text()
    (version,) = re.findall(r"^ARG RAY=rayproject/ray:([\d.]+)-", docker, re.MULTILINE)
    assert version.startswith(f"{lowest}.")
    assert {ray_cluster(document)["rayVersion"] for document in (JOB, SERVICE)} == {version}


def test_the_image_has_the_recipe_where_the_job_starts_it():
    docker = (DEPLOY / "Dockerfile").read_text()
    instructions = [line.split()[0] for line in docker.splitlines() if line and not line.startswith("#")]
    assert instructions == ["ARG", "FROM", "COPY", "WORKDIR", "RUN"]
    (home,) = re.findall(r"^COPY --chown=ray \. (\S+)$", docker, re.MULTILINE)
    script = next(word for word in shlex.split(JOB["spec"]["entrypoint"]) if word.endswith(".py"))
    assert (ROOT / Path(script).relative_to(home)).is_file()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", ".git", "runs"} <= set(ignored)
    assert not {"raytron", "recipes", "pyproject.toml", "README.md", "LICENSE"} & set(ignored)
