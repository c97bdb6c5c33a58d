"""What a submitted job takes along, and what it must not."""

from pathlib import Path

import pytest

from pipeline.cli.parcel import (
    check_config_goes_along,
    check_size,
    files_to_send,
    find_lost_paths,
    find_passwords,
    is_secret,
    local_paths,
    read_variables,
)
from pipeline.errors import UserError


def _write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("12345")


def test_code_goes_along_and_data_stays(tmp_path: Path) -> None:
    sent = ("run.yaml", "pipeline/data/order.py", "configs/a.yaml", "my/classes.txt", ".gitignore")
    _write(
        tmp_path, *sent,
        "data/a.txt", "runs/a/run.json", "mlruns/1", ".git/config", ".venv/bin/x", ".env",
        "my/a.parquet", "my/a.tar", "a.tar.gz", "pipeline/__pycache__/a.pyc", ".ruff_cache/a",
        "keys/a.pem", "mine/secret.txt", "skipped/a.txt", "gammaray.egg-info/PKG-INFO",
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text("mine/\n")
    (tmp_path / ".rayignore").write_text("skipped/\n")
    assert set(files_to_send(tmp_path)) == {*sent, ".rayignore"}
    assert files_to_send(tmp_path)["run.yaml"] == 5


def test_it_is_what_ray_packs(tmp_path: Path) -> None:
    from zipfile import ZipFile

    from ray._private.runtime_env.packaging import create_package

    from pipeline.cli.parcel import EXCLUDES

    folder = tmp_path / "folder"
    _write(folder, "run.yaml", "data/a", "deep/data/a", "b.parquet", "out/a", "out/deep/a")
    (folder / "deep" / ".gitignore").write_text("*.txt\n")
    (folder / ".gitignore").write_text("out/\n")
    _write(folder, "deep/a.txt")
    create_package(str(folder), tmp_path / "a.zip", include_gitignore=True, excludes=list(EXCLUDES))
    with ZipFile(tmp_path / "a.zip") as packed:
        files = {each.filename for each in packed.infolist() if not each.is_dir()}
    assert set(files_to_send(folder)) == files


def test_the_largest_things_are_named() -> None:
    sizes = {"run.yaml": 10, "w/a.bin": 2**20, "w/b.bin": 2**20, "x.bin": 2**19}
    check_size(Path("/p"), sizes, 3 * 2**20)
    with pytest.raises(UserError, match=r"4 files of 2.5 MiB .* less than 2.0 MiB \(the largest: "
                       r"w/ 2.0 MiB, x.bin 0.5 MiB, run.yaml 0.0 MiB\); name what"):  # fmt: skip
        check_size(Path("/p"), sizes, 2 * 2**20)


def test_the_config_must_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    _write(folder, "configs/a.yaml", "data/b.yaml")
    _write(tmp_path, "c.yaml")
    monkeypatch.chdir(folder)
    sizes = files_to_send(folder)
    assert check_config_goes_along(Path("configs/a.yaml"), folder, sizes) == "configs/a.yaml"
    with pytest.raises(UserError, match=r"\.\./c\.yaml: lies outside .*; copy it into"):
        check_config_goes_along(Path("../c.yaml"), folder, sizes)
    with pytest.raises(UserError, match=r"data/b\.yaml: is left out of what is sent"):
        check_config_goes_along(Path("data/b.yaml"), folder, sizes)


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "RAY_AUTH_TOKEN", "PGPASSWORD",
     "WANDB_API_KEY", "api_keys", "GOOGLE_APPLICATION_CREDENTIALS", "DB_PASSWD", "Secret"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    with pytest.raises(UserError, match=f"--env {name}: looks like a secret, .* instance roles"):
        read_variables([f"{name}=hunter2"])


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "NCCL_DEBUG", "AWS_REGION", "KEYBOARD"]
)
def test_names_of_no_secrets(name: str) -> None:
    assert read_variables([f"{name}=a=b"]) == {name: "a=b"}


def test_a_refusal_does_not_repeat_the_secret() -> None:
    with pytest.raises(UserError, match="--env PROXY: looks like a secret") as raised:
        read_variables(["PROXY=http://me:hunter2@proxy:3128"])
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("text", ["FOO", "=x", "1A=x", "A B=x"])
def test_what_is_no_variable(text: str) -> None:
    with pytest.raises(UserError, match="write it as NAME=VALUE"):
        read_variables([text])


def test_paths_that_a_job_would_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, "synonyms.txt", "tokens.json", "answers.json", "vit/config.json")
    values = {
        "data": {
            "train": [{"path": "data/a"}, {"path": "s3://bucket/b"}, {"path": "/mnt/c"}],
            "val": "data/val",
            "synonyms": "synonyms.txt",
            "tokenizer": "tokens.json",
        },
        "model": {
            "pretrained": "openai/clip-vit-base-patch32",
            "init": "runs/first",
            "image": {"pretrained": "vit"},
            "text": {"pretrained": "bert-base-uncased"},
        },
        "task": {"answers": "answers.json"},
        "tracking": {"uri": "sqlite:///mlflow.db"},
    }
    problems = find_lost_paths(values, {"synonyms.txt": 5})
    assert [problem.place for problem in problems] == [
        "cluster.storage", "data.train.0.path", "data.val", "model.init", "tracking.uri",
        "data.tokenizer", "task.answers", "model.image.pretrained",
    ]  # fmt: skip
    assert "is 'runs', relative; the job runs in a copy of this folder" in problems[0].message
    assert local_paths(values) == ["data.train.2.path /mnt/c"]


def test_paths_that_every_node_finds() -> None:
    values = {
        "data": {"train": "s3://bucket/a"},
        "cluster": {"storage": "/mnt/runs"},
        "tracking": {"uri": "sqlite:////mnt/runs/mlflow.db"},
    }
    assert not find_lost_paths(values, {})
    assert local_paths(values) == ["cluster.storage /mnt/runs"]


def test_passwords_in_urls_are_found_and_not_repeated() -> None:
    flat = {"tracking.uri": "http://me:hunter2@mlflow", "data.train": "s3://bucket/a", "n": 3}
    (problem,) = find_passwords(flat)
    assert problem.place == "tracking.uri"
    assert "hunter2" not in problem.message
