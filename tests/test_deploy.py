"""cluster.yaml and kuberay/: against the schemas of those who read them, and what must hold whatever the schemas allow."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.config import build_config
from pipeline.core.settings import checked
from pipeline.refresh.refresh import RefreshConfig

ROOT = Path(__file__).parent.parent
MANIFESTS = sorted((ROOT / "kuberay").glob("*.yaml"))
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|secret_access_key\s*:|RAY_AUTH_TOKEN\s*[=:]\s*\S|\b[0-9a-f]{32,}\b", re.IGNORECASE
)


@pytest.fixture
def cluster() -> dict[str, Any]:
    """cluster.yaml as `ray up` sees it: with Ray's defaults for AWS filled in."""
    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    return config


def documents(*kinds: str) -> dict[str, dict[str, Any]]:
    """The manifests of these kinds, by kind and name; without kinds all."""
    found = [document for file in MANIFESTS for document in yaml.safe_load_all(file.read_text())]
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found if not kinds or one["kind"] in kinds}


def clusters() -> list[dict[str, Any]]:
    """The specifications of the two Ray clusters: the one of a run and the one of the refresh."""
    found = documents("RayJob", "RayCluster")
    return [found["RayJob/mashup-run"]["spec"]["rayClusterSpec"], found["RayCluster/mashup"]["spec"]]


def pod_templates() -> list[dict[str, Any]]:
    """Of the pods that KubeRay makes."""
    submitter = documents("RayJob")["RayJob/mashup-run"]["spec"]["submitterPodTemplate"]
    groups = [group for spec in clusters() for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return [submitter, *(group["template"] for group in groups)]


def start_commands(cluster: dict[str, Any]) -> list[str]:
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_rays_own_code_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    validate_config(cluster)
    cluster["available_node_types"]["gpu_worker"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(cluster)


def test_the_dashboard_stays_on_the_head_and_every_start_asks_for_the_token(cluster: dict[str, Any]) -> None:
    head, worker = start_commands(cluster)
    assert "--head" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert all("export RAY_AUTH_MODE=token" in command.partition("ray start")[0] for command in (head, worker))
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_workers_have_one_accelerator_come_and_go_and_the_head_does_not(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types[cluster["head_node_type"]]
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert types["gpu_worker"]["resources"]["GPU"] == 1
    workers = [one for name, one in types.items() if name != cluster["head_node_type"]]
    assert [one["min_workers"] for one in workers] == [0] * len(workers)
    assert all(one["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for one in workers)
    assert all("IamInstanceProfile" in one["node_config"] for one in types.values())
    assert sum(one["max_workers"] for one in workers) <= cluster["max_workers"]


def test_nodes_get_this_source_and_the_ray_that_it_names(cluster: dict[str, Any]) -> None:
    """Ray's defaults for AWS would install a nightly Ray beside it."""
    commands = " ".join(cluster["head_setup_commands"] + cluster["worker_setup_commands"])
    assert "mashup-learning[gpu,quantize,track]" in commands
    assert "wheels" not in commands
    assert all((ROOT / source).exists() for source in cluster["file_mounts"].values() if not source.startswith("~"))


def test_all_nodes_that_are_asked_for_are_started_at_once(cluster: dict[str, Any]) -> None:
    """Both of Ray's autoscalers start speed x (the nodes of a kind that run, or one) at a time."""
    gpu_worker = cluster["available_node_types"]["gpu_worker"]
    assert cluster["upscaling_speed"] >= gpu_worker["max_workers"]
    text = (ROOT / "cluster.yaml").read_text()
    assert f"search: {{gpus_per_actor: 1, actors: {gpu_worker['max_workers']}}}" in text
    for spec in clusters():
        assert spec["autoscalerOptions"].get("upscalingMode", "Default") != "Conservative"
        (group,) = spec["workerGroupSpecs"]
        assert {one["search"]["actors"] for one in configs().values()} == {group["maxReplicas"]}


@pytest.mark.parametrize(("driver", "accepted"), [("580.95.05", True), ("610.1", True), ("570.133.20", False), (None, True)])
def test_a_node_whose_driver_is_too_old_is_refused(
    cluster: dict[str, Any], driver: str | None, accepted: bool, tmp_path: Path
) -> None:
    """And one without a GPU is not."""
    (command,) = [command for command in cluster["worker_setup_commands"] if "driver" in command]
    if driver:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "head").symlink_to(str(shutil.which("head")))
    done = subprocess.run(["/bin/bash", "-c", command], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == accepted, done.stderr
    assert accepted or f"NVIDIA driver {driver}: CUDA 13 wants 580 or newer" in done.stderr


def test_kernels_can_be_compiled_where_gpus_are(cluster: dict[str, Any]) -> None:
    """Triton needs a C compiler, the C library's headers and Python's."""
    installed = " ".join(cluster["worker_setup_commands"])
    assert all(re.search(rf"apt-get .*\b{package}\b", installed) for package in ("gcc", "libc6-dev", "python3-dev"))
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"apt-get install .*\bgcc libc6-dev\b", dockerfile)
    assert "Python.h" in dockerfile
    assert 'NVIDIA_REQUIRE_CUDA="cuda>=13.0"' in dockerfile


def test_adapters_are_kept_on_a_disk_that_can_feed_a_gpu(cluster: dict[str, Any], tmp_path: Path) -> None:
    """The local one where it is mounted, which a worker's processes learn from the environment that Ray starts in."""
    disk = cluster["available_node_types"]["gpu_worker"]["node_config"]["BlockDeviceMappings"][0]["Ebs"]
    assert disk["Throughput"] >= 500
    assert disk["Throughput"] <= disk["Iops"] / 4  # EBS allows no more
    _, start = start_commands(cluster)
    for mounted in (False, True):
        place = tmp_path / "mashup"
        if mounted:
            place.mkdir()
        command = start.replace("/opt/dlami/nvme", str(tmp_path)).partition("ray start")[0] + 'echo "${TMPDIR-}"'
        done = subprocess.run(["/bin/bash", "-c", command], env={"HOME": "/"}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == (str(place) if mounted else "")
    for spec in clusters():
        worker = spec["workerGroupSpecs"][0]["template"]["spec"]
        (container,) = worker["containers"]
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in worker["volumes"]}
        env = {one["name"]: one["value"] for one in container["env"]}
        assert "medium" not in volumes[places[env["TMPDIR"]]]
        assert env["HF_HOME"].startswith(env["TMPDIR"] + "/")
        assert volumes[places["/dev/shm"]]["medium"] == "Memory"


@pytest.mark.timeout(60)
def test_tokens_of_the_hub_come_from_a_file_that_need_not_be_there(cluster: dict[str, Any], tmp_path: Path) -> None:
    """Ray's processes on head and workers have them in their environment."""
    (tmp_path / "with/.mashup").mkdir(parents=True)
    (tmp_path / "with/.mashup/tokens.env").write_text("HF_TOKEN=of-the-hub\n")
    for start in start_commands(cluster):
        command = start.partition("ray start")[0] + "python3 -c 'import os; print(os.environ.get(\"HF_TOKEN\"))'"
        for home, token in {"with": "of-the-hub", "without": "None"}.items():
            env = {"HOME": str(tmp_path / home), "PATH": os.environ["PATH"]}
            done = subprocess.run(["/bin/bash", "-c", command], env=env, capture_output=True, text=True, check=True)
            assert done.stdout.strip() == token
    assert '# "~/.mashup/tokens.env": "~/.mashup/tokens.env"' in (ROOT / "cluster.yaml").read_text()


def test_tokens_of_the_hub_come_from_a_secret_that_need_not_be_there() -> None:
    account = (ROOT / "kuberay/account.yaml").read_text()
    for spec in clusters():
        for template in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = template["template"]["spec"]["containers"]
            secrets = [one["secretRef"] for one in container["envFrom"]]
            assert [one["name"] for one in secrets] == ["mashup-object-store", "mashup-tokens"]
            assert all(one["optional"] and f"secret generic {one['name']} " in account for one in secrets)
    assert "HF_TOKEN=" in account


def test_what_pods_write_is_on_volumes_of_a_size_that_is_asked_for() -> None:
    """Else it fills the node's disk, and the kubelet ends whom it likes."""
    for spec in clusters():
        for template in (spec["headGroupSpec"], spec["workerGroupSpecs"][0]):
            pod = template["template"]["spec"]
            (container,) = pod["containers"]
            mounted = {mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] in ("/tmp", "/scratch")}
            sizes = [int(one["emptyDir"]["sizeLimit"].removesuffix("Gi")) for one in pod["volumes"] if one["name"] in mounted]
            assert len(sizes) == len(mounted) > 0
            assert container["resources"]["requests"]["ephemeral-storage"] == f"{sum(sizes)}Gi"


def test_the_manifests_are_what_kubernetes_expects() -> None:
    """Unknown fields are errors. The pod templates inside Ray's own kinds are core Kubernetes, and checked as such."""
    version = kubernetes_validate.latest_version()
    core = [one for one in documents().values() if not one["apiVersion"].startswith("ray.io")]
    assert {one["kind"] for one in core} == {"ServiceAccount", "ConfigMap", "CronJob"}
    about = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
    templates = [about | {"template": one} for one in pod_templates()]
    assert len(templates) == 5
    for document in core + templates:
        kubernetes_validate.validate(document, version, strict=True)
    templates[0]["template"]["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="imag"):
        kubernetes_validate.validate(templates[0], version, strict=True)


def a(kind: str, **limits: Any) -> dict[str, Any]:
    return {"type": kind, **limits}


def with_fields(required: str, **fields: Any) -> dict[str, Any]:
    """An object of these fields and no others."""
    return a("object", required=required.split(), additionalProperties=False, properties=fields)


TEXTS = a("object", additionalProperties=a("string"))
TEMPLATE = a("object", required=["spec"])
COUNT = a("integer", minimum=0)
RAY_CLUSTER = with_fields(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=a("string"),
    authOptions=with_fields("mode", mode={"enum": ["disabled", "token"]}, secretName=a("string")),
    enableInTreeAutoscaling=a("boolean"),
    autoscalerOptions=with_fields("", version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    headGroupSpec=with_fields("rayStartParams template", rayStartParams=TEXTS, template=TEMPLATE, serviceType=a("string")),
    workerGroupSpecs=a(
        "array",
        items=with_fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=a("string"),
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=TEMPLATE,
        ),
    ),
)
RAY_JOB = with_fields(
    "entrypoint rayClusterSpec",
    entrypoint=a("string"),
    shutdownAfterJobFinishes=a("boolean"),
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    submitterPodTemplate=TEMPLATE,
    rayClusterSpec=RAY_CLUSTER,
)


def test_rays_own_kinds_have_the_fields_that_kuberay_documents() -> None:
    """No package carries KubeRay's schemas, so these are ours: the fields that the manifests use, by name, type and what is
    required, as KubeRay 1.6 documents them. They see a misspelt field and a number where text belongs; they do not see what the
    operator checks beyond that, nor what another release renames."""
    for name, document in documents("RayJob", "RayCluster").items():
        assert document["apiVersion"] == "ray.io/v1"
        jsonschema.validate(document["spec"], RAY_JOB if name.startswith("RayJob") else RAY_CLUSTER)


def test_both_clusters_have_the_same_nodes_and_ask_for_the_token() -> None:
    run, refresh = clusters()
    assert run["workerGroupSpecs"] == refresh["workerGroupSpecs"]
    run_head, refresh_head = (spec["headGroupSpec"]["template"]["spec"] for spec in (run, refresh))
    assert run_head["containers"] == refresh_head["containers"]
    for spec in (run, refresh):
        assert spec["authOptions"]["mode"] == "token"
        assert spec["rayVersion"] == ray.__version__
        (group,) = spec["workerGroupSpecs"]
        (worker,) = group["template"]["spec"]["containers"]
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert (group["minReplicas"], spec["enableInTreeAutoscaling"]) == (0, True)


def configs() -> dict[str, dict[str, Any]]:
    """What the manifests ask for, by the name of their ConfigMap."""
    return {name: yaml.safe_load(one["data"]["config.yaml"]) for name, one in documents("ConfigMap").items()}


def test_the_configs_ask_for_accelerators_that_are_not_there_yet() -> None:
    asked = configs()
    run = build_config(asked["ConfigMap/mashup-run"], "manifest")
    assert (run.search.gpus_per_actor, run.train.gpus_per_worker) == (1, 1)
    assert checked(RefreshConfig, asked["ConfigMap/mashup-refresh"], "manifest").search.gpus_per_actor == 1


def test_pods_run_as_nobody_special() -> None:
    cron = documents("CronJob")["CronJob/mashup-refresh"]["spec"]["jobTemplate"]["spec"]["template"]
    for template in (*pod_templates(), cron):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert [one["securityContext"]["allowPrivilegeEscalation"] for one in template["spec"]["containers"]] == [False]


def test_a_refresh_never_meets_another_and_its_names_agree() -> None:
    found = documents()
    spec = found["CronJob/mashup-refresh"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    (submit,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    env = {one["name"]: one for one in submit["env"]}
    assert env["RAY_API_SERVER_ADDRESS"]["value"] == "http://mashup-head-svc:8265"  # KubeRay names it after the cluster
    token = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert token == {"name": found["RayCluster/mashup"]["spec"]["authOptions"]["secretName"], "key": "auth_token"}
    for cluster in clusters():
        volume = cluster["headGroupSpec"]["template"]["spec"]["volumes"][0]
        assert f"ConfigMap/{volume['configMap']['name']}" in found


@pytest.mark.parametrize("file", [ROOT / "cluster.yaml", ROOT / "Dockerfile", *MANIFESTS], ids=lambda file: file.name)
def test_no_secret_is_written_down(file: Path) -> None:
    assert not SECRET.search(file.read_text())


def test_images_have_the_ray_that_the_package_asks_for() -> None:
    texts = [(ROOT / "Dockerfile").read_text(), *(file.read_text() for file in MANIFESTS)]
    images = [version for text in texts for version in re.findall(r"rayproject/ray:([\d.]+)", text)]
    assert len(images) == 3
    assert set(images) == {ray.__version__}


@pytest.mark.parametrize("text", ["AKIA" + "A" * 16, "RAY_AUTH_TOKEN=abc", "auth_token: " + "0a" * 16])
def test_a_secret_would_be_seen(text: str) -> None:
    assert SECRET.search(text)
