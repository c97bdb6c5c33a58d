from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config.load import dump, load_config, parse_config
from pipeline.config.schema import Config, flatten
from pipeline.errors import UserError
from tests.tiny import tiny_config, tiny_values


def _write(folder: Path, values: dict) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_defaults_are_those_the_readme_promises() -> None:
    """A changed default changes every run that does not name it: it must be on purpose."""
    config = tiny_config()
    assert (config.loss.kind, config.loss.prior, config.loss.u) == ("gamma", "none", "mean")
    assert config.loss.virtual_batch == "global"
    assert (config.loss.rho, config.loss.fastclip_gamma) == (6.5, 0.8)
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (5e-4, (0.9, 0.98), 1e-6)
    assert (config.optim.weight_decay, config.optim.grad_clip) == (0.2, 1.0)
    assert config.optim.schedule == "cosine"
    defaults = Config.model_validate({**tiny_values(), "engine": {}})
    assert (defaults.engine.zero_stage, defaults.engine.precision) == (1, "bf16")
    assert defaults.engine.micro_batch == "auto"
    assert config.model.logit_scale_init == pytest.approx(1 / 0.07)
    assert (config.data.crop_scale, config.data.flip) == ((0.9, 1.0), 0.0)
    assert (config.data.clean_captions, config.data.augment_image) == (False, "none")
    assert (config.data.augment_text, config.data.synonyms) == (0.0, None)
    assert config.data.shuffle_window == 4096
    assert config.evaluate.every == "end"
    assert config.cluster.max_failures == 3


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    path = _write(tmp_path, tiny_values())
    config = load_config(
        path, ["train.global_batch=512", "optim.lr=1e-3", "data.crop_scale=[0.5, 1]"]
    )
    assert config.train.global_batch == 512
    assert config.optim.lr == 1e-3
    assert config.data.crop_scale == (0.5, 1)


def test_local_paths_become_absolute_and_urls_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"train": "a/b", "val": "s3://bucket/x", "synonyms": "groups.txt"}
    config = parse_config(tiny_values(data=data), "test")
    assert config.data.train[0].path == str(tmp_path / "a/b")
    assert config.data.val == "s3://bucket/x"
    assert config.data.synonyms == str(tmp_path / "groups.txt")
    assert config.cluster.storage == str(tmp_path / "runs")


def test_unknown_keys_are_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    path = _write(tmp_path, tiny_values(train={"globl_batch": 3}, optim={"learning": 1}))
    with pytest.raises(UserError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "2 problems" in text
    assert "train.globl_batch: unknown key; did you mean train.global_batch?" in text
    assert "optim.learning: unknown key; keys here: " in text


def test_nested_unknown_key_is_named_in_its_own_section(tmp_path: Path) -> None:
    path = _write(tmp_path, tiny_values(model={"image": {"sise": 32}}))
    with pytest.raises(
        UserError, match=r"model.image.sise: unknown key; did you mean model.image.size"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch=many", "train.global_batch: is 'many'"),
        ("train.global_batch=0", "train.global_batch: is 0"),
        ("engine.zero_stage=4", "engine.zero_stage: is 4"),
        ("engine.precision=fp64", "engine.precision: is 'fp64'"),
        ("data.crop_scale=[0.9, 0.1]", "crop_scale is"),
        ("data.second_view.crop_scale=[0, 0.1]", "crop_scale is"),
        ("data.image_mean=[123, 0.5, 0.5]", "data.image_mean.0: is 123"),
        ("data.image_std=[0.2, 0, 0.2]", "data.image_std.1: is 0"),
        ("data.background=[0, 0, 256]", "data.background.2: is 256"),
        ("structure.bridge.t=1.5", "structure.bridge.t: is 1.5"),
        ("structure.bridge.t=[]", "structure.bridge.t: is ()"),
        (
            "structure.separation={weight: 1, orthogonality: 0, contrast: 0, uniformity: 0}",
            "nothing trains the independent features",
        ),
        ("model.image.patch=7", "patch is 7; it must divide size 16"),
        ("model.image={size: 24, patch: 12, stem: conv}", "patch is 12; with stem conv it is 2, 4"),
        ("model.image={stem: conv, pretrained: org/vit}", "a pretrained ViT (org/vit) reads patch"),
        ("model.text.heads=3", "heads is 3; it must divide width 16"),
        ("optim={lr: 1e-4, min_lr: 1e-3}", "min_lr is 0.001; it must not be above lr 0.0001"),
        ("optim={min_lr: 1e-5, schedule: constant}", "a constant rate does not fall"),
        ("train.epochs=1", "exactly one of samples and epochs"),
        ("name=a/b", "name: is 'a/b'"),
        ("evaluate.zero_shot=[{column: c, prompts: [none]}]", "each needs one {} for the class"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(_write(tmp_path, tiny_values()), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [("nonsense", "write it as section.key=value"), ("name.x=1", "name is a value, not a section")],
)
def test_malformed_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(_write(tmp_path, tiny_values()), [override])


def test_missing_file_bad_yaml_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(path)
    path.write_text("- 1")
    with pytest.raises(UserError, match="a config is a mapping"):
        load_config(path)


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = tiny_config(evaluate={"zero_shot": [{"column": "shape"}]}, data={"val": "v"})
    path = tmp_path / "again.yaml"
    path.write_text(dump(config))
    assert load_config(path) == config


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        tiny_config().train.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_flatten_gives_dotted_plain_values() -> None:
    flat = flatten(tiny_config())
    assert flat["model.image.size"] == 16
    assert flat["data.val"] == "None"
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())


def test_every_shipped_config_is_valid() -> None:
    paths = sorted(Path("configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path)


def test_training_data_is_one_path_or_a_list_of_sources() -> None:
    one = tiny_config(data={"train": "a/b"})
    (source,) = one.data.train
    assert (source.path, source.weight) == (str(Path("a/b").absolute()), 1.0)
    values = [{"path": "s3://x/y", "weight": 2, "caption_column": "alt"}, {"path": "z"}]
    first, second = tiny_config(data={"train": values}).data.train
    assert (first.path, first.weight, first.caption_column) == ("s3://x/y", 2.0, "alt")
    assert Path(second.path).is_absolute()
    for wrong, message in (
        ([], "data.train: .*at least 1 item"),
        ([{"path": "a", "wieght": 2}], r"data.train.0.wieght: unknown key; did you mean .*weight"),
        ([{"path": "a", "weight": 0}], r"data.train.0.weight: is 0; .*greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_config(data={"train": wrong})
