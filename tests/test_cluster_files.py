"""The files of cluster/: manifests fit KubeRay's CRDs, commands fit today's command lines, nothing stands open.

No cluster is needed. What `kubectl kustomize` prints is compared where kubectl is there, CRDs are used where the folder that
has them lies beside the repository.
"""

import copy
import functools
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from mdt_ray.cli import JOBS, parse
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
CRDS = ROOT.parent / "shared" / "kuberay"
RAY_JOBS = ("precompute", "train", "tune", "evaluate", "all")
PIPELINES = {name: "quickstart" if name == "all" else name for name in RAY_JOBS}
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not beside the repository")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def cluster() -> dict:
    return read(KUBERAY / "cluster" / "cluster.yaml")


def entrypoint(name: str) -> str:
    return yaml.safe_load(read(KUBERAY / name / "kustomization.yaml")["patches"][0]["patch"])["spec"]["entrypoint"]


def ray_job(name: str) -> dict:
    """The RayJob as its folder's kustomization puts it together, without kubectl (and with the image's placeholder)."""
    job = read(KUBERAY / "job" / "job.yaml")
    job["metadata"]["name"] += f"-{name}"
    job["spec"] |= {"entrypoint": entrypoint(name), "rayClusterSpec": cluster()["spec"]}
    return job


def rendered(folder: Path) -> list[dict]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def settings() -> dict[str, str]:
    lines = (KUBERAY / "shared" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def pods(spec: dict) -> dict[str, dict]:
    """The pod templates of a RayCluster's spec, by group."""
    return {"head": spec["headGroupSpec"]["template"]} | {g["groupName"]: g["template"] for g in spec["workerGroupSpecs"]}


def containers(spec: dict) -> dict[str, dict]:
    return {name: pod["spec"]["containers"][0] for name, pod in pods(spec).items()}


# KubeRay's CRDs


def strict(schema: Any) -> Any:
    """A CRD's schema that also refuses fields it does not name, as an API server does with `--validate=strict`."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: {name: strict(part) for name, part in value.items()} if key == "properties" else strict(value)
              for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@functools.cache
def crd(kind: str) -> jsonschema.Draft202012Validator:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte: seconds without libyaml
    found = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=loader)
    version = next(v for v in found["spec"]["versions"] if v["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return jsonschema.Draft202012Validator(schema)


def mistakes(manifest: dict) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in crd(manifest["kind"]).iter_errors(manifest)]


@needs_crds
def test_manifests_fit_the_crds():
    for manifest in (cluster(), *map(ray_job, RAY_JOBS)):
        assert mistakes(manifest) == []


@needs_crds
@needs_kubectl
@pytest.mark.parametrize("folder", ["cluster", *RAY_JOBS])
def test_rendered_manifests_fit_the_crds(folder):
    for manifest in rendered(KUBERAY / folder):
        assert mistakes(manifest) == []


@needs_crds
@pytest.mark.parametrize(("path", "value", "complaint"), [
    (("spec", "backofLimit"), 3, "'backofLimit' was unexpected"),
    (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "livenesProbe"), {},
     "'livenesProbe' was unexpected"),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"), 0, "'minReplica' was unexpected"),
    (("spec", "backoffLimit"), "10", "'10' is not of type 'integer'"),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), 8, "8 is not of type 'string'"),
    (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0, "value"), 120,
     "120 is not of type 'string'"),
    (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
])
def test_misspelt_fields_and_wrong_types_are_found(path, value, complaint):
    job = copy.deepcopy(ray_job("train"))
    *parents, last = path
    functools.reduce(lambda part, key: part[key], parents, job)[last] = value
    assert any(complaint in mistake for mistake in mistakes(job)), mistakes(job)


def test_the_strict_schema_closes_what_names_its_fields_only():
    schema = strict({"type": "object", "properties": {
        "properties": {"type": "object", "properties": {"name": {"type": "string"}}},  # a field of that name
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "anything": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "port": {"x-kubernetes-int-or-string": True}}})
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check({"properties": {"name": "a"}, "labels": {"b": "c"}, "anything": {"d": 1}, "port": "http"})
    assert not check({"other": 1})
    assert not check({"properties": {"nam": "a"}})
    assert not check({"labels": {"b": 1}})
    assert not check({"port": 1.5})


# What kustomize makes of the folders


@needs_kubectl
@pytest.mark.parametrize("name", RAY_JOBS)
def test_a_folder_is_one_job_on_the_nodes_of_the_cluster(name):
    found, expected = rendered(KUBERAY / name), ray_job(name)
    [image] = read(KUBERAY / "cluster" / "kustomization.yaml")["images"]
    for container in containers(expected["spec"]["rayClusterSpec"]).values():
        container["image"] = f"{image['newName']}:{image['newTag']}"
    assert found == [expected]


@needs_kubectl
def test_the_claim_is_mounted_on_all_nodes_where_it_is_asked_for(tmp_path):
    copied = tmp_path / "kuberay"
    shutil.copytree(KUBERAY, copied)
    for file, line in (("cluster", "components: [../pvc]"), ("shared", "- pvc.yaml")):
        path = copied / file / "kustomization.yaml"
        text = path.read_text()
        assert f"# {line}" in text
        path.write_text(text.replace(f"# {line}", line))
    claim = next(m for m in rendered(copied / "shared") if m["kind"] == "PersistentVolumeClaim")
    [job] = rendered(copied / "train")
    for name, pod in pods(job["spec"]["rayClusterSpec"]).items():
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        mounts = {m["name"]: m["mountPath"] for m in pod["spec"]["containers"][0]["volumeMounts"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name
        assert mounts == {"shm": "/dev/shm", "shared": "/shared"}
    if CRDS.is_dir():
        assert mistakes(job) == []


@needs_kubectl
def test_what_is_shared_has_the_names_that_the_nodes_ask_for():
    found = {m["kind"]: m for m in rendered(KUBERAY / "shared")}
    assert found["ConfigMap"]["data"] == settings()
    for container in containers(cluster()["spec"]).values():
        asked = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
        assert asked == [found["ConfigMap"]["metadata"]["name"]]


def test_ray_is_the_version_of_the_constraints():
    assert cluster()["spec"]["rayVersion"] == PINS["ray"]


# The nodes


def test_the_head_does_no_work_and_is_not_preemptible():
    head = cluster()["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in head["template"]["spec"]
    affinity = head["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    [term] = affinity["nodeSelectorTerms"]
    kept_off = {rule["key"]: (rule["operator"], rule["values"]) for rule in term["matchExpressions"]}
    for group in cluster()["spec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        preferred = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        rules = [rule for item in preferred for rule in item["preference"]["matchExpressions"]]
        assert {rule["key"]: ("NotIn", rule["values"]) for rule in rules} == kept_off
        assert {t["key"] for t in spec["tolerations"]} - {"nvidia.com/gpu"} <= kept_off.keys()


def test_both_groups_start_from_nothing():
    spec = cluster()["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    groups = {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    assert groups.keys() == {"gpu", "cpu"}
    assert all(g["minReplicas"] == g["replicas"] == 0 < g["maxReplicas"] for g in groups.values())
    gpus = {name: c["resources"]["limits"].get("nvidia.com/gpu") for name, c in containers(spec).items()}
    assert gpus["head"] is gpus["cpu"] is None
    # As many GPUs as the jobs ask for, which with the presets' CPUs for each fit into a pod.
    assert int(gpus["gpu"]) * groups["gpu"]["maxReplicas"] >= int(settings()["MDT_GPUS"])
    cpus = int(containers(spec)["gpu"]["resources"]["limits"]["cpu"])
    assert cpus >= int(gpus["gpu"]) * parse("train", [settings()["MDT_PRESET"]]).settings.workers.cpus_per_worker
    # Memory without which a pod is killed before others are.
    assert all(c["resources"]["requests"] == c["resources"]["limits"] for c in containers(spec).values())


def test_shared_memory_holds_the_object_store_and_the_rest():
    spec = cluster()["spec"]
    starts = {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    for name, pod in pods(spec).items():
        [mount] = [m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        [volume] = [v for v in pod["spec"]["volumes"] if v["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        size, memory = (int(text.removesuffix("Gi")) * 2**30 for text in (
            volume["emptyDir"]["sizeLimit"], pod["spec"]["containers"][0]["resources"]["limits"]["memory"]))
        assert int(starts[name]["rayStartParams"]["object-store-memory"]) < size < memory


def test_nodes_are_probed_named_their_network_and_given_time_to_leave():
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.modules.reporter import healthz_agent

    assert '@routes.get("/api/healthz")' in inspect.getsource(healthz_agent)
    for pod in pods(cluster()["spec"]).values():
        assert pod["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
        container = pod["spec"]["containers"][0]
        env = {e["name"]: e["value"] for e in container["env"]}
        for probe in ("livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"] == {
                "path": "/api/healthz", "port": DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
        assert container["livenessProbe"]["failureThreshold"] * container["livenessProbe"]["periodSeconds"] >= 300
        assert env["NCCL_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] == "eth0"
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "bash"
        assert (ROOT / command[1]).is_file()
        patience = int(re.search(r"LEAVE_SECONDS:-(\d+)", (ROOT / command[1]).read_text())[1])
        assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
        assert pod["spec"]["terminationGracePeriodSeconds"] > max(patience, int(env["RAY_JOB_STOP_WAIT_TIME_S"]))


def test_a_failed_job_is_tried_again():
    for name in RAY_JOBS:
        spec = ray_job(name)["spec"]
        assert spec["backoffLimit"] > 0
        assert spec["shutdownAfterJobFinishes"] is True
        assert "activeDeadlineSeconds" not in spec  # KubeRay does not retry after it
        assert "clusterSelector" not in spec  # KubeRay refuses backoffLimit with it


# Who may come in


def test_ray_asks_for_a_token_everywhere():
    assert cluster()["spec"]["authOptions"] == {"mode": "token", "secretName": "mdt-ray-auth"}
    launcher = read(CLUSTER / "launcher.yaml")
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in launcher[key]
              if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token " in line for line in starts)
    assert "~/.ray/auth_token" in launcher["file_mounts"]
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    for path in (p for p in CLUSTER.rglob("*") if p.is_file()):
        assert not re.search(r"RAY_AUTH_MODE[=\W]+disabled", path.read_text()), path


def test_dashboards_are_on_loopback_where_no_policy_guards_them():
    commands = [line for line, _ in ray_commands() if " start " in line and "--head" in line]
    assert len(commands) >= 3  # Slurm, the launcher, the README
    assert all("--dashboard-host=127.0.0.1" in line for line in commands)


def test_the_policy_lets_in_only_ray_itself_and_the_operator():
    policy = read(KUBERAY / "shared" / "network-policy.yaml")["spec"]
    chosen = policy["podSelector"]["matchLabels"]
    for pod in pods(cluster()["spec"]).values():
        assert chosen.items() <= pod["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": chosen}}]}
    # One peer with both selectors: two peers would let in the whole namespace.
    assert operator["from"] == [{
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ray-system"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    head = cluster()["spec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not {"enableIngress", "ingressOptions"} & head.keys()


def test_containers_have_no_rights_that_they_do_not_need():
    for name, pod in pods(cluster()["spec"]).items():
        user, rights = pod["spec"]["securityContext"], pod["spec"]["containers"][0]["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] == user["runAsGroup"] == 1000  # the Dockerfile's
        assert rights == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        assert name == "head" or pod["spec"]["automountServiceAccountToken"] is False  # KubeRay's autoscaler needs it


def test_no_secret_is_written_down():
    for path in (p for p in CLUSTER.rglob("*") if p.is_file()):
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|\bhf_\w{20}|\b[0-9a-f]{32,}\b|kind: Secret", text), path
    assert not [name for name in settings() if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]
    for container in containers(cluster()["spec"]).values():
        assert not [e for e in container["env"] if re.search("KEY|TOKEN|SECRET|PASSWORD", e["name"])]
        assert {"secretRef": {"name": "mdt-ray-storage", "optional": True}} in container["envFrom"]


# Command lines


def shell_commands() -> list[tuple[str, Path]]:
    """All commands in the files of cluster/ and on the other pages, their settings filled in: of manifests, scripts,
    comments, pages."""
    found = [(entrypoint(name), KUBERAY / name) for name in RAY_JOBS]
    for path in (CLUSTER / "README.md", CLUSTER / "Dockerfile", CLUSTER / "launcher.yaml", CLUSTER / "leave.sh",
                 CLUSTER / "slurm" / "run.sbatch", *KUBERAY.rglob("*.yaml"), ROOT / "README.md",
                 *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"\\\n[#\s]*", " ", path.read_text())
        if path.name == "launcher.yaml":
            launcher = read(path)
            found += [(line, path) for key, lines in launcher.items() if key.endswith("_commands") for line in lines]
        for line in text.splitlines():
            if path.suffix == ".yaml" and not line.startswith("#"):
                continue  # entrypoints and the launcher's lists are read as YAML
            line = line.strip().removeprefix("#").strip()
            if re.match(r"(\(umask 077; )?(ray|python|sbatch) ", line) or "ray start --block" in line:
                found.append((re.split(r"\s+# ", line)[0], path))
    return [(re.sub(r"\$(MDT_\w+)", lambda name: settings()[name[1]], line), path) for line, path in found]


def ray_commands() -> list[tuple[str, Path]]:
    """The parts of `shell_commands` from the word `ray` on."""
    found = []
    for line, path in shell_commands():
        match = re.search(r"(?:^|[\s;(])(ray (?:[a-z-]+).*)", line)
        if match and "python " not in line.partition("ray ")[0]:
            found.append((match[1].rstrip("&").strip(), path))
    return found


def pipelines_called() -> list[tuple[str, list[str]]]:
    found = []
    for line, path in shell_commands():
        match = re.search(r"python pipelines/(\w+)\.py(.*)", line)
        if match:
            assert (ROOT / "pipelines" / f"{match[1]}.py").is_file(), path
            found.append((match[1], [os.path.expandvars(word) for word in shlex.split(match[2], comments=True)]))
    return found


def test_every_pipeline_is_called_and_its_command_parses():
    called = pipelines_called()
    assert {name for name, _ in called} == set(RAY_JOBS)
    for name, arguments in called:
        parse(PIPELINES[name], list(arguments))


def test_jobs_have_all_the_settings_they_cannot_start_without():
    for name, arguments in pipelines_called():
        job, found = JOBS[PIPELINES[name]], parse(PIPELINES[name], list(arguments)).settings
        assert all(getattr(found, needed) for needed in job.needed), (name, arguments)
        assert "runs/" not in found.output  # a folder of one node's disk


def test_a_wrong_setting_is_found():
    with pytest.raises(SystemExit):
        parse("train", [settings()["MDT_PRESET"], "--workers.num-worker", "8"])


def test_commands_of_ray_parse():
    """By Ray's own command line, which reads the options and runs nothing."""
    from ray.scripts.scripts import cli

    kinds = set()
    for line, path in ray_commands():
        line = re.sub(r"\$\(.*?\)|\$\w+", "1", line)  # what the shell fills in
        words = shlex.split(re.split(" 2?>>? ", line)[0].partition(" | ")[0].partition(" && ")[0], comments=True)[1:]
        command = cli.get_command(None, words[0])
        assert command, f"{path}: {line}"
        kinds.add(words.pop(0))
        if hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("ray", words)
    assert kinds >= {"start", "job", "up", "down", "dashboard", "drain-node", "health-check", "get-auth-token", "stop"}


# Ray's cluster launcher


def test_the_launcher_file_is_what_ray_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(CLUSTER / "launcher.yaml")
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepared | {"idle_timeout": 5})
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared | {"max_workers": "5"})
    types = config["available_node_types"]
    assert config["max_workers"] == sum(t["max_workers"] for name, t in types.items() if name != "head")
    assert types["head"]["resources"]["CPU"] == 0
    assert all(t["min_workers"] == 0 for name, t in types.items() if name != "head")
    assert all(t["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for n, t in types.items() if n != "head")
    assert all(t["node_config"]["SecurityGroupIds"] for t in types.values())
    # No port but what the group opens, and the group is the user's.
    assert "security_group" not in config["provider"]


# Slurm


JOB = f"{10**6 + os.getpid()}"
"""Slurm's number of the job: another for each run of the tests, for a folder in /tmp is named after it."""
FAKES = {
    # A step runs what it is given, here.
    "srun": 'while [[ "$1" == -* ]]; do shift; done\necho "srun $*" >> "$LOG"\nexec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"',
    "hostname": "echo 192.0.2.7",
    # Of a Ray of paper, nodes cannot be counted.
    "python": 'if [ "$1" = - ]; then echo "nodes $2 at $RAY_ADDRESS" >> "$LOG"; exit "${MISSING:-0}"; fi\n'
              f'exec {sys.executable} "$@"',
    "ray": 'echo "ray $*" >> "$LOG"\n'
           'echo "mode $RAY_AUTH_MODE token ${#RAY_AUTH_TOKEN}" >> "$LOG"\n'
           'if [ "$1" = health-check ]; then exit "${UNHEALTHY:-0}"; fi\nexec sleep 60',
    "sleep": 'if [ "$1" = 2 ]; then exit 0; fi\nexec /bin/sleep "$@"',
    "driver": 'until [ "$(grep -c "^mode" "$LOG")" -ge 3 ]; do /bin/sleep 0.05; done  # the check, the head, the others\n'
              'echo "driver $* at $RAY_ADDRESS" >> "$LOG"\nstat --format "folder %a" "/tmp/ray-$SLURM_JOB_ID" >> "$LOG"\n'
              'trap \'echo "driver saved" >> "$LOG"; exit 143\' TERM\n'
              'echo ready >> "$LOG"\nif [ -n "${CODE:-}" ]; then exit "$CODE"; fi\nwhile :; do /bin/sleep 0.05; done',
}


class Slurm:
    """The batch script as Slurm runs it, with everything around it made of paper. (Under a real one: jobs/test_slurm.py.)"""

    def __init__(self, folder: Path, **env: str):
        (folder / "bin").mkdir()
        for name, body in FAKES.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)
        self.log = folder / "log"
        self.log.touch()
        self.process = subprocess.Popen(
            ["bash", str(CLUSTER / "slurm" / "run.sbatch"), "driver", "--latents", "a b"], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "LOG": str(self.log),
                 "SLURM_JOB_ID": JOB, "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1",
                 "SLURM_CPUS_PER_TASK": "16"} | env)

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 60
        while line not in self.log.read_text().splitlines():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def end(self) -> tuple[int, list[str]]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, self.log.read_text().splitlines() + output.splitlines()


def test_slurm_starts_ray_with_a_token_and_hands_on_the_code(tmp_path):
    code, lines = Slurm(tmp_path, CODE="7").end()
    assert code == 7
    head, worker = [line for line in lines if line.startswith("srun ray start")]
    assert "--head" in head
    assert "--node-ip-address=192.0.2.7 --port=6379" in head
    assert f"--temp-dir=/tmp/ray-{JOB}/ray" in head
    assert "folder 700" in lines
    assert not Path(f"/tmp/ray-{JOB}").exists()
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=192.0.2.7:6379" in worker
    assert {line for line in lines if line.startswith("mode")} == {"mode token token 64"}
    assert "nodes 2 at 192.0.2.7:6379" in lines
    assert "driver --latents a b at 192.0.2.7:6379" in lines
    assert not any(line.startswith("scontrol") for line in lines)


def test_slurm_does_not_start_ray_in_what_another_user_made(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o777)
    Path(f"/tmp/ray-{JOB}").symlink_to(tmp_path / "theirs")
    code, lines = Slurm(tmp_path, CODE="0").end()
    assert code == 1
    assert f"/tmp/ray-{JOB} belongs to another user, who could change what Ray runs: have it deleted" in lines
    assert not any("ray start" in line for line in lines)


def test_slurm_puts_a_job_that_is_out_of_time_into_the_queue_again(tmp_path):
    job = Slurm(tmp_path)
    job.wait_for("ready")
    job.process.send_signal(signal.SIGUSR1)
    code, lines = job.end()
    assert code == 143
    assert lines.count("driver saved") == 1
    assert f"scontrol requeue {JOB}" in lines


def test_slurm_puts_a_job_that_lost_a_node_of_ray_into_the_queue_again(tmp_path):
    job = Slurm(tmp_path)
    job.wait_for("ready")
    next(p for p in psutil.Process(job.process.pid).children() if p.name() == "sleep").kill()
    code, lines = job.end()
    assert code == 143
    assert any(line.startswith(f"a node of Ray has ended (mdt-ray-{JOB}-ray.log says why)") for line in lines)
    assert lines.count("driver saved") == 1
    assert f"scontrol requeue {JOB}" in lines


def test_slurm_does_not_do_so_for_ever(tmp_path):
    job = Slurm(tmp_path, SLURM_RESTART_COUNT="20")
    job.wait_for("ready")
    next(p for p in psutil.Process(job.process.pid).children() if p.name() == "sleep").kill()
    code, lines = job.end()
    assert code == 143
    assert not any(line.startswith("scontrol") for line in lines)


def test_slurm_lets_a_job_that_was_told_to_stop_end(tmp_path):
    job = Slurm(tmp_path)
    job.wait_for("ready")
    job.process.send_signal(signal.SIGTERM)
    code, lines = job.end()
    assert code == 143
    assert "driver saved" in lines
    assert not any(line.startswith("scontrol") for line in lines)


def test_slurm_says_where_the_head_does_not_answer(tmp_path):
    code, lines = Slurm(tmp_path, UNHEALTHY="1").end()
    assert code == 1
    assert f"Ray's head does not answer at 192.0.2.7:6379; mdt-ray-{JOB}-ray.log says why" in lines
    assert not any(line.startswith("driver") for line in lines)


def test_slurm_does_not_begin_without_all_nodes(tmp_path):
    code, lines = Slurm(tmp_path, MISSING="1").end()
    assert code == 1
    assert not any(line.startswith("driver") for line in lines)


def test_slurm_asks_for_a_signal_before_the_end_and_may_come_again():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (CLUSTER / "slurm" / "run.sbatch").read_text(), re.M))
    assert options["signal"] == "B:USR1@300"
    assert {"requeue", "exclusive"} <= options.keys()
    assert options["open-mode"] == "append"


# A pod that goes


@pytest.mark.parametrize(("env", "processes", "told", "waits"), [
    ({"FQ_RAY_IP": "head", "RAY_ADDRESS": "head:6379"}, "8 ray::IDLE\n9 ray::DashboardAgent", False, False),
    ({"FQ_RAY_IP": "head", "RAY_ADDRESS": "head:6379"}, "8 ray::IDLE\n9 ray::RayTrainWorker", True, True),
    ({}, "", False, False),
    ({}, "7 python pipelines/train.py", False, True),
    ({}, "7 python -m mdt_ray.cli train digits", False, True),
    ({}, "7 python -m ray.dashboard.agent", False, False),
    ({}, "7 /bin/sh -c python pipelines/train.py", False, False),
])
def test_a_pod_waits_for_its_work_to_be_saved(tmp_path, env, processes, told, waits):
    log = tmp_path / "log"
    gone = f"grep -qs slept {log} && exit 1"  # (else how long it takes would decide)
    find = f'{gone}; while read -r id line; do [[ $line =~ $2 ]] && echo "$id $line"; done <<< "{processes}" | grep .'
    for name, body in {"pgrep": find, "ray": f'echo "$*" >> {log}', "pkill": f'echo "pkill $*" >> {log}',
                       "sleep": f'echo slept >> {log}; exec /bin/sleep 0.2'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", str(CLUSTER / "leave.sh")], check=True, timeout=60,
                   env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "LEAVE_SECONDS": "40"} | env)
    lines = log.read_text().splitlines() if log.exists() else []
    assert any(line.startswith("drain-node --address head:6379") for line in lines) == told
    assert any(line.startswith("pkill -TERM -f ^") for line in lines) == ("RAY_ADDRESS" not in env)
    assert ("slept" in lines) == waits


# The image


def test_the_image_is_built_in_stages_from_the_constraints_and_is_nobodys_root():
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line and "==" not in line for line in installs)
    assert {"boto3", "setuptools"} <= set(PINS)
    assert all("--no-build-isolation" in line for line in installs if re.search(r" \.| \"\.", line))  # by that setuptools
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")):]
    assert not any("pip install" in line for line in last)  # the last stage gets what the first one made
    allowed = {line.removeprefix("!") for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
               if line.startswith("!")}
    copied = {source for line in lines if line.startswith("COPY ") and "--from" not in line
              for source in line.split()[1:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert "HOME=/home/ray" in text  # where Ray's cluster launcher mounts what belongs into ~
    # A login shell takes PATH from /etc/profile.
    assert re.search(r"^RUN .*'PATH=/opt/venv/bin:\$PATH' > /etc/profile\.d/\w+\.sh$", text, re.MULTILINE)


@pytest.mark.slow
def test_the_image_gets_the_whole_package(tmp_path):
    """What the first stage copies and runs, without the dependencies, in a folder and an environment of its own."""
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
    first = text[text.index("FROM "):text.rindex("FROM ")]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = os.environ | {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "PIP_NO_DEPS": "1"}
    build = tmp_path / "build"
    build.mkdir()
    for kind, line in re.findall(r"^(COPY|RUN) (.*)$", first, re.MULTILINE):
        if kind == "COPY":
            *sources, target = line.split()
            for source in sources:
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy2)(ROOT / source, build / target)
        elif " -m venv " not in line:
            subprocess.run(["bash", "-ec", line], check=True, cwd=build, env=environment)
    shutil.rmtree(build)
    show = "import pathlib, mdt_ray; print(pathlib.Path(mdt_ray.__file__).parent)"
    done = subprocess.run(["python", "-c", show], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    installed = Path(done.stdout.strip())
    assert installed.is_relative_to(tmp_path / "venv")
    for path in (ROOT / "mdt_ray").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (installed / path.relative_to(ROOT / "mdt_ray")).read_bytes() == path.read_bytes(), path


def test_one_image_everywhere():
    [image] = read(KUBERAY / "cluster" / "kustomization.yaml")["images"]
    name = f"{image['newName']}:{image['newTag']}"
    assert read(CLUSTER / "launcher.yaml")["docker"]["image"] == name
    assert f"-t {name} ." in (CLUSTER / "Dockerfile").read_text()
    assert {container["image"] for container in containers(cluster()["spec"]).values()} == {image["name"]}


# The document


def test_the_readme_names_files_that_are_there():
    text = (CLUSTER / "README.md").read_text()
    for name in re.findall(r"[\s`]((?:cluster|kuberay|slurm)/[\w./-]*\w)", text):
        assert (ROOT / name).exists() or (CLUSTER / name).exists(), name
    for folder in ("shared", "cluster", *RAY_JOBS):
        assert f"kubectl apply -k cluster/kuberay/{folder}" in text
    for name in re.findall(r"MDT_\w+", text):
        assert name in settings(), name
