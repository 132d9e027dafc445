"""What can be checked of the files under deploy/ without an engine to run them."""

import re
from pathlib import Path

import pytest
import yaml
from quire.config import SPECIAL_VARIABLES
from quire_server.middleware import PUBLIC
from quire_server.settings import DrainSettings, ServerSettings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
PORT = ServerSettings().port


def section_of(variables):
    """`QUIRE_SERVER__A__B=x` as the nested values of the section."""
    found = {}
    for name, value in variables.items():
        *parents, last = name.removeprefix("QUIRE_SERVER__").lower().split("__")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = yaml.safe_load(value)
    return found


def test_the_image_copies_what_it_installs():
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'^    "((?:framework|plugins|server)\S*)",$', project, re.MULTILINE)
    assert packages
    assert all(any(package.startswith(name) for name in " ".join(copied).split()) for package in packages)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"framework", "plugins", "server"} & set(ignored)


def test_the_image_serves_on_the_servers_own_port_as_nobody():
    assert f"EXPOSE {PORT}" in DOCKERFILE
    assert f"127.0.0.1:{PORT}/health" in DOCKERFILE
    assert 'ENTRYPOINT ["quire", "serve", "--host", "0.0.0.0"]' in DOCKERFILE
    for target in ("cpu", "cuda"):
        (stage,) = re.findall(rf"^FROM base AS {target}$(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
        assert stage.rstrip().endswith("USER quire")
        assert "'.[server" in stage
    extras = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", extras, re.MULTILINE) for extra in ("server", "cuda"))


def test_the_variables_are_known():
    assert re.findall(r"\b(QUIRE_\w+)=", DOCKERFILE) == ["QUIRE_CACHE_DIR"]
    assert "QUIRE_CACHE_DIR" in SPECIAL_VARIABLES


@pytest.mark.parametrize(
    "variables",
    [
        COMPOSE["services"]["cpu"]["environment"],
        COMPOSE["services"]["cuda"]["environment"],
        {entry["name"]: entry["value"] for entry in CONTAINER["env"]},
    ],
)
def test_the_settings_are_known(variables):
    settings = ServerSettings(**section_of(variables))
    assert settings.api_keys_file is not None
    assert settings.drain.timeout == 30


def test_compose_builds_the_images_targets_and_waits_for_the_drain():
    for name, service in COMPOSE["services"].items():
        assert f"AS {name}" in DOCKERFILE
        assert service["build"]["target"] == name
        assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
        assert int(service["stop_grace_period"].removesuffix("s")) > DrainSettings().timeout


def test_kubernetes_probes_ask_public_paths_and_the_pod_outlives_the_drain():
    (port,) = CONTAINER["ports"]
    assert port == {"name": "http", "containerPort": PORT}
    assert SERVICE["spec"]["ports"][0]["targetPort"] == "http"
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = CONTAINER[probe]["httpGet"]
        assert asked["path"] in PUBLIC
        assert asked["port"] == "http"
    drain = section_of({entry["name"]: entry["value"] for entry in CONTAINER["env"]})["drain"]
    assert POD["terminationGracePeriodSeconds"] > drain["grace"] + drain["timeout"]
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert {volume["name"] for volume in POD["volumes"]} == set(mounts)
    assert mounts["models"] == "/models"
