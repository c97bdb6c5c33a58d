"""The manifests for Kubernetes: known to their schemas, and in agreement with one another."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from pipeline.config.load import load_config
from tests.cluster.manifests import (
    KUBERAY,
    ROOT,
    Json,
    definition,
    gibibytes,
    groups,
    kubernetes_objects,
    mistakes,
    pinned,
    ray_container,
    read,
)

[RAYCLUSTER] = read(KUBERAY / "raycluster.yaml")
[RAYJOB] = read(KUBERAY / "rayjob.yaml")
SPECS = {"RayCluster": RAYCLUSTER["spec"], "RayJob": RAYJOB["spec"]["rayClusterSpec"]}
OBJECTS = kubernetes_objects()
KUBERNETES = "1.33"  # the oldest that is still maintained by the large clouds


def _name(thing: Json) -> str:
    return f"{thing['kind']}/{thing['metadata']['name']}"


def _find(kind: str, name: str) -> Json:
    [found] = [thing for thing in OBJECTS if _name(thing) == f"{kind}/{name}"]
    return found


def _pod_specs() -> dict[str, Json]:
    specs = {
        f"{kind}/{name}": group["template"]["spec"]
        for kind, spec in SPECS.items()
        for name, group in groups(spec).items()
    }
    specs["RayJob/submitter"] = RAYJOB["spec"]["submitterPodTemplate"]["spec"]
    for thing in OBJECTS:
        if thing["kind"] in ("Deployment", "StatefulSet"):
            specs[_name(thing)] = thing["spec"]["template"]["spec"]
    return specs


PODS = _pod_specs()
RAY_GROUPS = [(kind, name) for kind, spec in SPECS.items() for name in groups(spec)]


@pytest.mark.parametrize(
    ("manifest", "kind"), [(RAYCLUSTER, "rayclusters"), (RAYJOB, "rayjobs")], ids=["cluster", "job"]
)
class TestDefinitions:
    def test_kuberay_knows_every_field(self, manifest: Json, kind: str) -> None:
        assert list(mistakes(manifest, definition(kind))) == []

    def test_fields_it_does_not_know_are_found(self, manifest: Json, kind: str) -> None:
        broken: Any = copy.deepcopy(manifest)
        cluster = broken["spec"].get("rayClusterSpec", broken["spec"])
        cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolcy"] = "Always"
        cluster["workerGroupSpecs"][0]["maxReplicas"] = "many"
        found = "\n".join(mistakes(broken, definition(kind)))
        assert "imagePullPolcy" in found
        assert "maxReplicas: 'many' is not of type 'integer'" in found


@pytest.mark.parametrize(
    "thing", [thing for thing in OBJECTS if thing["apiVersion"] != "ray.io/v1"], ids=_name
)
def test_kubernetes_knows_every_field(thing: Json) -> None:
    kubernetes_validate.validate(thing, KUBERNETES, strict=True)


def test_names_do_not_collide_and_share_a_namespace() -> None:
    names = [_name(thing) for thing in OBJECTS]
    assert len(names) == len(set(names))
    cluster_wide = ("Namespace", "PriorityClass")
    spaces = {
        thing["metadata"].get("namespace") for thing in OBJECTS if thing["kind"] not in cluster_wide
    }
    assert spaces == {"gammaray"}


@pytest.mark.parametrize("pod", PODS, ids=str)
class TestPods:
    def test_passes_the_restricted_level(self, pod: str) -> None:
        spec = PODS[pod]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all("hostPath" not in volume for volume in spec.get("volumes", ()))

    def test_asks_for_what_it_may_use(self, pod: str) -> None:
        for container in PODS[pod]["containers"]:
            resources = container["resources"]
            assert set(resources) == {"requests", "limits"}
            assert resources["requests"].keys() == resources["limits"].keys() >= {"cpu", "memory"}

    def test_mounts_volumes_that_exist(self, pod: str) -> None:
        spec = PODS[pod]
        claims = [
            claim["metadata"]["name"]
            for thing in OBJECTS
            if _name(thing) == pod
            for claim in thing["spec"].get("volumeClaimTemplates", ())
        ]
        volumes = {volume["name"] for volume in spec.get("volumes", ())} | set(claims)
        mounts = {
            mount["name"]
            for container in spec["containers"]
            for mount in container.get("volumeMounts", ())
        }
        assert mounts == volumes

    def test_needs_only_secrets_that_are_listed(self, pod: str) -> None:
        listed = {
            thing["metadata"]["name"]: set(thing["stringData"])
            for thing in OBJECTS
            if thing["kind"] == "Secret"
        }
        for container in PODS[pod]["containers"]:
            for variable in container.get("env", ()):
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in listed[reference["name"]]
            for source in container.get("envFrom", ()):
                assert source["secretRef"]["name"] in listed

    def test_has_a_class_and_an_account_that_exist(self, pod: str) -> None:
        spec = PODS[pod]
        if "priorityClassName" in spec:
            _find("PriorityClass", spec["priorityClassName"])
        if "serviceAccountName" in spec:
            _find("ServiceAccount", spec["serviceAccountName"])


@pytest.mark.parametrize(("kind", "name"), RAY_GROUPS)
class TestGroups:
    def test_drains_before_it_is_killed(self, kind: str, name: str) -> None:
        group = groups(SPECS[kind])[name]
        env = {entry["name"]: entry["value"] for entry in ray_container(group)["env"]}
        drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        # Stopping Ray's processes after the drain takes seconds; a spot notice is two minutes.
        assert drain + 15 <= grace <= 120
        assert drain == 0 if name == "head" else drain >= 60

    def test_shared_memory_holds_the_object_store(self, kind: str, name: str) -> None:
        group = groups(SPECS[kind])[name]
        memory = gibibytes(ray_container(group)["resources"]["limits"]["memory"])
        [shm] = [
            volume["emptyDir"]
            for volume in group["template"]["spec"]["volumes"]
            if volume["name"] == "dshm"
        ]
        mounts = {
            mount["name"]: mount["mountPath"] for mount in ray_container(group)["volumeMounts"]
        }
        assert mounts["dshm"] == "/dev/shm"
        assert shm["medium"] == "Memory"
        assert 0.3 * memory <= gibibytes(shm["sizeLimit"]) <= 0.5 * memory

    def test_runs_where_it_should(self, kind: str, name: str) -> None:
        affinity = groups(SPECS[kind])[name]["template"]["spec"]["affinity"]["nodeAffinity"]
        terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        rules = [rule for term in terms for rule in term["matchExpressions"]]
        values = {rule["key"]: rule["values"] for rule in rules}
        assert values == {
            "karpenter.sh/capacity-type": ["spot"],
            "eks.amazonaws.com/capacityType": ["SPOT"],
            "cloud.google.com/gke-spot": ["true"],
        }
        is_spot = name == "gpu-spot"
        assert {rule["operator"] for rule in rules} == {"In" if is_spot else "NotIn"}
        # Terms are alternatives, the rules of one term are not: any spot label, or none of them.
        assert len(terms) == (3 if is_spot else 1)

    def test_is_not_tidied_away(self, kind: str, name: str) -> None:
        found = groups(SPECS[kind])[name]["template"]["metadata"]["annotations"]
        assert found["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
        # Karpenter would not end such a pod when its spot machine goes, and so nobody would drain.
        assert ("karpenter.sh/do-not-disrupt" in found) == (name != "gpu-spot")

    def test_image_is_the_projects(self, kind: str, name: str, version: str) -> None:
        image = ray_container(groups(SPECS[kind])[name])["image"]
        assert image == f"registry.example.com/gammaray:{version}"


class TestCluster:
    @pytest.mark.parametrize("kind", SPECS)
    def test_head_takes_no_work_and_asks_for_a_token(self, kind: str) -> None:
        spec = SPECS[kind]
        assert spec["rayVersion"] == pinned("ray")
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert spec["authOptions"]["mode"] == "token"
        assert "auth_token" in _find("Secret", spec["authOptions"]["secretName"])["stringData"]

    def test_cluster_grows_from_nothing(self) -> None:
        spec = SPECS["RayCluster"]
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        for group in spec["workerGroupSpecs"]:
            assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, 0, 4)

    def test_job_has_a_fixed_size(self) -> None:
        spec = SPECS["RayJob"]
        assert "enableInTreeAutoscaling" not in spec
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] > 0

    def test_job_and_cluster_have_the_same_pods(self) -> None:
        pods = [
            {name: group["template"] for name, group in groups(spec).items()}
            for spec in SPECS.values()
        ]
        assert pods[0] == pods[1]

    @pytest.mark.parametrize("kind", SPECS)
    def test_holds_the_run_of_the_example(self, kind: str, example: Any) -> None:
        gpus = cpus = 0
        for group in SPECS[kind]["workerGroupSpecs"]:
            limits = ray_container(group)["resources"]["limits"]
            cpus += group["maxReplicas"] * int(limits["cpu"])
            gpus += group["maxReplicas"] * int(limits.get("nvidia.com/gpu", 0))
        assert gpus >= example.max_workers * example.gpus_per_worker
        assert cpus >= example.max_workers * example.cpus_per_worker + example.ingest_cpus

    def test_sizes_in_the_headers_are_true(self) -> None:
        for path, spec in (("raycluster", "RayCluster"), ("rayjob", "RayJob")):
            header = (KUBERAY / f"{path}.yaml").read_text().split("\napiVersion")[0]
            gpus, cpus = map(int, re.findall(r"(\d+)\s(?:#\s)?(?:GPUs|CPUs)", header))
            found = [
                sum(
                    group["maxReplicas"]
                    * int(ray_container(group)["resources"]["limits"].get(key, 0))
                    for group in SPECS[spec]["workerGroupSpecs"]
                )
                for key in ("nvidia.com/gpu", "cpu")
            ]
            assert [gpus, cpus] == found, path


class TestJob:
    def test_retries_and_cleans_up(self) -> None:
        spec = RAYJOB["spec"]
        assert spec["backoffLimit"] >= 1
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        for manifest in (RAYCLUSTER, RAYJOB):
            assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gammaray"

    def test_entrypoint_is_a_run_that_the_project_accepts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        python, dash, module, config, *overrides = shlex.split(RAYJOB["spec"]["entrypoint"])
        assert (python, dash, module) == ("python", "-m", "jobs.pretrain")
        assert config.startswith("/opt/gammaray/")  # where the image has the configs
        monkeypatch.chdir(tmp_path)
        run = load_config(ROOT / config.removeprefix("/opt/gammaray/"), overrides)
        assert run.cluster.storage.startswith("s3://")
        service = _find("Service", "mlflow")
        name, space = service["metadata"]["name"], service["metadata"]["namespace"]
        assert (
            run.tracking.uri == f"http://{name}.{space}.svc:{service['spec']['ports'][0]['port']}"
        )

    def test_submitter_runs_the_same_image(self) -> None:
        [submitter] = RAYJOB["spec"]["submitterPodTemplate"]["spec"]["containers"]
        assert submitter["image"] == ray_container(SPECS["RayJob"]["headGroupSpec"])["image"]


class TestNetwork:
    def test_policies_select_pods_that_exist(self) -> None:
        labels = [
            {"ray.io/is-ray-node": "yes"},
            RAYJOB["spec"]["submitterPodTemplate"]["metadata"]["labels"],
            *(
                thing["spec"]["template"]["metadata"]["labels"]
                for thing in OBJECTS
                if thing["kind"] in ("Deployment", "StatefulSet")
            ),
        ]
        for thing in OBJECTS:
            if thing["kind"] != "NetworkPolicy":
                continue
            peers = [
                peer
                for rules, side in (("ingress", "from"), ("egress", "to"))
                for rule in thing["spec"].get(rules, ())
                for peer in rule.get(side, ())
                if "podSelector" in peer and "namespaceSelector" not in peer
            ]
            for selector in (thing["spec"], *peers):
                wanted = selector["podSelector"]["matchLabels"]
                assert any(wanted.items() <= found.items() for found in labels), wanted

    def test_no_pod_is_open_to_all(self) -> None:
        for thing in OBJECTS:
            if thing["kind"] == "NetworkPolicy":
                assert "Ingress" in thing["spec"]["policyTypes"]
                assert all(rule.get("from") for rule in thing["spec"]["ingress"])
            if thing["kind"] == "Service":
                assert thing["spec"].get("type", "ClusterIP") == "ClusterIP"


class TestMlflow:
    def test_image_is_the_clients_version(self) -> None:
        [server] = _find("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
        assert server["image"] == f"registry.example.com/gammaray-mlflow:{pinned('mlflow')}"

    def test_answers_to_the_name_of_its_service_alone(self) -> None:
        [server] = _find("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
        env = {entry["name"]: entry.get("value") for entry in server["env"]}
        hosts = env["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
        assert "mlflow.gammaray.svc:5000" in hosts
        assert not any("*" in host for host in hosts)

    def test_uses_postgres_and_s3_without_a_password_in_sight(self) -> None:
        [server] = _find("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
        env = {entry["name"]: entry.get("value") for entry in server["env"]}
        database = _find("Service", "mlflow-database")
        host, port = database["metadata"]["name"], database["spec"]["ports"][0]["port"]
        uri = f"postgresql+psycopg2://mlflow@{host}:{port}/mlflow"
        assert env["MLFLOW_BACKEND_STORE_URI"] == uri
        assert env["MLFLOW_ARTIFACTS_DESTINATION"].startswith("s3://")
        assert env["PGPASSWORD"] is None


def test_the_example_of_secrets_holds_none() -> None:
    for secret in read(KUBERAY / "secrets.example.yaml"):
        assert set(secret["stringData"].values()) == {""}
    for path in KUBERAY.glob("*.yaml"):
        if path.name != "secrets.example.yaml":
            assert "kind: Secret\n" not in path.read_text()
