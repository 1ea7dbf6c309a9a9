"""Settings: what is read from YAML and key=value, and how what cannot be used is told to the user."""

import logging
from pathlib import Path

import pytest
import yaml

from dino.config.read import dump, get, leaves, read
from dino.config.schema import AUTO, Config
from dino.curation.settings import CurateConfig
from dino.errors import UserError
from dino.methods import METHODS
from dino.training.settings import load

REPOSITORY = Path(__file__).resolve().parents[2]
EARLIER = Path(__file__).with_name("earlier_version.yaml")  # as the version before the renamed settings wrote it
OLD_NAMES = """
objective.momentum=0.95 objective.momentum_end=0.97 objective.mask_share=0.25 objective.centering=centre
optim.freeze_last_layer_steps=7 model.initialisation=fan_in train.shard=true train.checkpoint_blocks=true
"""  # of settings that earlier_version.yaml has, and what they are called now
NEW_NAMES = {
    **{"objective.teacher_momentum": 0.95, "objective.teacher_momentum_end": 0.97, "objective.mask_fraction": 0.25},
    **{"objective.centering": "center", "objective.freeze_last_layer_steps": 7, "model.weight_init": "fan_in"},
    **{"train.fsdp": True, "train.activation_checkpointing": True},
}
IMPOSSIBLE = """
train.batch_size=0 train.batch_size=-5 train.accumulation=0 train.keep_checkpoints=0 train.checkpoint_every=0
train.epochs=0 train.epochs=inf monitor.log_every=0 monitor.health_every=-1 model.patch_size=0 model.depth=0
model.embed_dim=0 model.drop_path=-0.1 optim.lr=0 optim.lr=-0.1 optim.warmup_steps=-1 optim.clip_grad=-1
optim.betas=[0.9] optim.betas=[0.9,1.0] objective.student_temperature=0 objective.teacher_temperature=0
objective.teacher_momentum=1.5 objective.center_momentum=-0.1 objective.prototypes=0 objective.sinkhorn_iterations=0
objective.mask_ratio=[0.5,0.4] objective.mask_ratio=[0.4] data.workers=-1 data.max_unreadable=2 views.local_crops=-1
views.global_scale=[0.4] views.global_scale=[0.5,0.4] views.local_scale=[0,0.4] views.local_scale=[0.1,1.5]
views.std=[0.2,0,0.2]
"""


@pytest.fixture
def yaml_file(tmp_path):
    """Function that writes a YAML file and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value)


class TestReading:
    @pytest.mark.parametrize("text", ["", "# nothing yet\n", "train:\n  # batch_size: 64\nmodel:\n"])
    def test_what_is_not_given_is_the_defaults(self, yaml_file, text):
        assert load(yaml_file(text)) == load() == Config()

    def test_arguments_come_after_the_file_and_the_file_after_the_defaults(self, yaml_file):
        path = yaml_file("train:\n  batch_size: 64\n  epochs: 7\nmodel: {arch: vit_tiny}\n")
        config = load(path, ["train.batch_size=32", "train.batch_size=16"])
        assert (config.train.batch_size, config.train.epochs, config.model.arch) == (16, 7.0, "vit_tiny")
        assert config.train.seed == Config().train.seed

    def test_values_of_python_are_taken_as_they_are(self):
        given = {"train.batch_size": 32, "views.mean": [0.5], "optim.lr": 1, "tracking.name": None, "data.root": "1e3"}
        config = load(None, given)
        assert {key: get(config, key) for key in given} == given
        with pytest.raises(UserError, match=r"unknown key 'train\.batchsize'"):
            load(None, {"train.batchsize": 32})

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            # YAML 1.1 takes 1e-3 for text; in a file as on the command line it is a number.
            *((f"optim.lr={text}", 0.001) for text in ("1e-3", "0.001", "1.0e-3", "1E-3", "+0.001")),
            *((f"{key}=1", 1.0) for key in ("optim.lr_end", "objective.teacher_momentum_end", "train.epochs")),
            ("train.steps=500", 500),
            ("train.steps=auto", AUTO),
            ("monitor.health_every=0", 0),
            ("views.mean=[0.1,0.2,0.3]", [0.1, 0.2, 0.3]),
            ("views.mean=null", None),
            ("views.global_scale=[0.25, 1]", [0.25, 1.0]),
            ("train.time_limit=90", 90.0),
            ("train.compile=true", True),
            ("tracking.backends=[wandb,tensorboard]", ["wandb", "tensorboard"]),
            ("tracking.backends=[]", []),
            ("model.embed_dim=96", 96),
        ],
    )
    def test_a_value_is_the_same_in_a_file_and_as_an_argument(self, yaml_file, setting, value):
        key, text = setting.split("=")
        group, name = key.split(".")
        for config in (load(None, [setting]), load(yaml_file(f"{group}: {{{name}: {text}}}"))):
            assert get(config, key) == value
            assert type(get(config, key)) is type(value)

    @pytest.mark.parametrize(
        "text", ["../a b/c=d", "2024", "/data/2024-01-01", "a: b", "007", "12e03", "yes", "x #1", "[brackets]", "~x"]
    )
    def test_a_path_or_name_is_taken_as_it_is_written(self, text):
        config = load(None, [f"data.root={text}", f"tracking.name={text}"])
        assert (config.data.root, config.tracking.name) == (text, text)

    @pytest.mark.parametrize("text", ["${HOME}/images", "${data.kind}", "???", "${"])
    def test_what_omegaconf_reads_in_a_path_of_its_own_is_no_traceback(self, text):
        """Taken as some text, or refused as a wrong value."""
        try:
            told = load(None, [f"data.root={text}"]).data.root
        except UserError as error:
            told = str(error)
        assert isinstance(told, str)

    def test_every_kind_of_value_is_read_back_as_it_was_written(self, yaml_file):
        config = Config()
        config.data.root = "C: \\dir #1 é 日本 'quoted'"
        config.tracking.name, config.tracking.backends = "1e-3", ["wandb"]
        config.optim.lr, config.optim.lr_end = 1e-5, 1e-12
        config.train.steps, config.train.time_limit, config.train.compile = 10**9, 0.5, True
        config.views.mean = [0.1, 1 / 3, 2e-7]
        config.objective.teacher_momentum = 0.99999999
        assert load(yaml_file(dump(config))) == config

    def test_the_recipe_of_a_curation_shows_the_defaults(self):
        assert read(CurateConfig, REPOSITORY / "configs" / "curate.yaml") == CurateConfig()


class TestEarlierVersions:
    @pytest.mark.parametrize("how", ["file", "arguments"])
    def test_settings_keep_their_meaning_and_their_new_names_are_told(self, how, caplog):
        with caplog.at_level(logging.INFO, logger="dino"):
            config = load(EARLIER) if how == "file" else load(None, [*OLD_NAMES.split(), "views.backend=device"])
        assert {key for key in leaves(config) if get(config, key) != get(Config(), key)} == NEW_NAMES.keys()
        assert {key: get(config, key) for key in NEW_NAMES} == NEW_NAMES
        said = [record.getMessage().removeprefix(f"{EARLIER}: ") for record in caplog.records]
        assert len(said) == len(OLD_NAMES.split())
        assert "objective.momentum is called objective.teacher_momentum now" in said
        assert "objective.centering=centre is called objective.centering=center now" in said

    def test_every_other_setting_of_the_earlier_version_is_there(self):
        written = {f"{group}.{key}" for group, keys in yaml.safe_load(EARLIER.read_text()).items() for key in keys}
        gone = written - leaves(Config()).keys()
        assert gone == {old.split("=")[0] for old in OLD_NAMES.split()} - {"objective.centering"} | {"views.backend"}

    def test_a_new_name_on_the_command_line_comes_after_an_old_one_in_the_file(self):
        assert load(EARLIER, ["objective.teacher_momentum=0.5"]).objective.teacher_momentum == 0.5
        assert load(EARLIER, ["objective.momentum=0.5"]).objective.teacher_momentum == 0.5

    def test_what_cannot_be_had_any_more_is_refused(self):
        assert "views.backend=workers cannot be had any more" in refusal(None, "views.backend=workers")


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "near"),
        [
            ("train.batchsize", "train.batch_size"),
            ("optim.learning_rate_end", "optim.lr_end"),
            ("model.patchsize", "model.patch_size"),
            ("views.n_local_crops", "views.local_crops"),
            ("trian.seed", "train.seed"),
        ],
    )
    def test_an_unknown_key_names_the_nearest(self, yaml_file, key, near):
        group, name = key.split(".")
        for text in (refusal(None, f"{key}=1"), refusal(yaml_file(f"{group}: {{{name}: 1}}"))):
            assert text == f"unknown key '{key}'; did you mean '{near}'?"

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            # A wrong type, with the type that is wanted and the value.
            *((f"train.batch_size={text}", "a whole number, got ") for text in ("many", "2.5", "true", "[1]")),
            ("train.epochs=long", "a number, got 'long'"),
            ("train.compile=maybe", "true or false, got 'maybe'"),
            *((f"train.steps={text}", "a whole number or 'auto', got ") for text in ("soon", "2.5", "true")),
            ("optim.lr=fast", "a number or 'auto', got 'fast'"),
            ("optim.betas=0.9", "a list of numbers, got 0.9"),
            ("views.global_scale=[small, large]", "a list of numbers, got ['small', 'large']"),
            ("train.time_limit=soon", "a number or none, got 'soon'"),
            # An unknown choice, with all that there are and the nearest.
            ("model.arch=vit_smal", "got 'vit_smal'; did you mean 'vit_small'?"),
            ("views.preset=dino2", ", line_art, got 'dino2'; did you mean 'dinov2'?"),
            ("objective.centering=centr", "got 'centr'; did you mean 'center'?"),
            ("objective.name=dinov2", "got 'dinov2'; did you mean 'dino'?"),
            ("optim.name=adam", "must be one of adamw, sgd, muon, lars, got 'adam'; did you mean 'adamw'?"),
            ("data.cache=devise", "got 'devise'; did you mean 'device'?"),
            ("data.kind=omniglot_training", "got 'omniglot_training'; did you mean 'omniglot_train'?"),
            ("train.precision=bfloat16", "got 'bfloat16'; did you mean 'bf16'?"),
            # Out of bounds, with the bounds.
            ("train.seed=-1", "must be at least 0 and below "),
            ("train.steps=0", "must be auto or at least 1, got 0"),
            ("optim.lr=nan", "must be auto or above 0, got nan"),
            ("model.drop_path=1.0", "must be at least 0 and below 1, got 1.0"),
        ],
    )
    def test_a_value_of_no_use_is_told_with_those_that_are(self, yaml_file, setting, said):
        key, _ = setting.split("=")
        assert refusal(None, setting).startswith(f"{key} must be ")
        assert said in refusal(None, setting)

    @pytest.mark.parametrize("setting", IMPOSSIBLE.split())
    def test_a_value_that_cannot_work_names_its_key(self, setting):
        assert setting.split("=")[0] in refusal(None, setting)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            # Also where one of the two is the arch's own: vit_small has 384 and 6.
            (["model.embed_dim=100", "model.num_heads=3"], ["model.embed_dim=100", "model.num_heads=3"]),
            (["model.embed_dim=100"], ["model.embed_dim=100", "model.num_heads=6"]),
            (["model.num_heads=7"], ["model.embed_dim=384", "model.num_heads=7"]),
            (["views.global_size=225"], ["views.global_size=225", "224 or 240"]),
            (["views.local_size=100"], ["views.local_size=100", "96 or 112"]),
            (["views.global_size=224", "model.patch_size=14"], ["views.local_size=96", "84 or 98"]),
            (["views.local_size=8"], ["views.local_size=8 is smaller than one patch", "model.patch_size=16"]),
            (["train.batch_size=100", "train.accumulation=3"], ["train.batch_size=100", "train.accumulation=3"]),
            (["train.fsdp=true", "optim.name=sgd"], ["train.fsdp", "optim.name"]),
            (["objective.ibot_prototypes=4"], ["objective.ibot_prototypes", "objective.ibot_head=separate"]),
            (["train.batch_size"], ["'train.batch_size' is not a setting", "write key=value"]),
        ],
    )
    def test_settings_that_do_not_go_together_are_named(self, settings, said):
        text = refusal(None, *settings)
        assert [part for part in said if part not in text] == []

    def test_sizes_do_not_matter_where_there_are_no_patches_or_no_crops(self):
        without_patches = load(None, ["model.arch=resnet50", "views.global_size=225", "views.local_size=97"])
        assert (without_patches.views.global_size, without_patches.views.local_size) == (225, 97)
        assert load(None, ["views.local_crops=0", "views.local_size=97"]).views.local_size == 97

    @pytest.mark.parametrize(
        "settings",
        [
            ("train.batchsize=3", "train.seed=x", "model.depht=2", "train.epochs=9"),
            ("train.batch_size=0", "model.arch=vgg", "views.local_crops=-1"),
        ],
    )
    def test_all_errors_are_listed_at_once(self, settings):
        first, *others = refusal(None, *settings).splitlines()
        assert first == "3 settings cannot be used:"
        assert [setting for setting in settings[:3] if not any(setting.split("=")[0] in line for line in others)] == []
        assert len(others) == 3

    @pytest.mark.parametrize(
        ("content", "where"),
        [
            (b"train: {batch_size: [", "line 1, column 22"),
            (b"a: b: c", "line 1, column 5"),
            (b"train:\n\t- x", "line 2, column 1"),
            (b"a: 1\nkey: @v", "line 2, column 6"),
            (b"a: {b: 1}\na: &x [*x]", "line 2"),
            ("a: 1".encode("utf-16"), "save it as UTF-8"),
            (bytes(range(256)), "save it as UTF-8"),
        ],
    )
    def test_broken_yaml_is_one_line_that_says_where(self, tmp_path, content, where):
        (tmp_path / "config.yaml").write_bytes(content)
        said = refusal(tmp_path / "config.yaml")
        assert "config.yaml is not valid YAML" in said
        assert where in said
        assert "\n" not in said

    def test_a_list_where_a_method_is_named(self, yaml_file):
        said = refusal(yaml_file("objective: {name: [dino]}"))
        assert said == f"objective.name must be {' | '.join(METHODS)}, got ['dino']"

    @pytest.mark.parametrize("content", ["[1, 2]", "just text", "3"])
    def test_yaml_without_groups_names_those_that_there_are(self, yaml_file, content):
        text = refusal(yaml_file(content))
        assert "must hold groups of settings" in text
        assert "train" in text

    def test_no_such_file(self, tmp_path):
        (tmp_path / "folder.yaml").mkdir()
        for name in ("missing.yaml", "folder.yaml"):
            assert "cannot read the config" in refusal(tmp_path / name)
