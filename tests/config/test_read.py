"""Settings: what is read from YAML and key=value, and how what cannot be used is told to the user."""

import importlib.util
import sys
from pathlib import Path

import pytest

from dino.config.describe import describe
from dino.config.read import dump, get, leaves, read
from dino.config.schema import AUTO, Config
from dino.curation.settings import CurateConfig
from dino.errors import UserError
from dino.training.settings import check, load

REPOSITORY = Path(__file__).resolve().parents[2]


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
    def test_nothing_given_is_the_defaults(self):
        assert load() == Config()

    def test_arguments_come_after_the_file_and_the_file_after_the_defaults(self, yaml_file):
        path = yaml_file("train:\n  batch_size: 64\n  epochs: 7\nmodel: {arch: vit_tiny}\n")
        config = load(path, ["train.batch_size=32", "train.batch_size=16"])
        assert (config.train.batch_size, config.train.epochs, config.model.arch) == (16, 7.0, "vit_tiny")
        assert config.train.seed == Config().train.seed

    def test_an_empty_file_is_the_defaults(self, yaml_file):
        assert load(yaml_file("# nothing yet\n")) == Config()

    def test_an_empty_group_is_its_defaults(self, yaml_file):
        """All of its lines commented out."""
        assert load(yaml_file("train:\n  # batch_size: 64\nmodel: {arch: vit_tiny}\n")).train == Config().train

    @pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3", "1E-3", "+0.001"])
    @pytest.mark.parametrize("key", ["optim.lr", "optim.lr_end"])
    def test_numbers_as_people_write_them(self, yaml_file, key, text):
        """YAML 1.1 takes 1e-3 for text; in a file as on the command line it is a number."""
        group, name = key.split(".")
        assert get(load(None, [f"{key}={text}"]), key) == 0.001
        assert get(load(yaml_file(f"{group}: {{{name}: {text}}}")), key) == 0.001

    @pytest.mark.parametrize(
        "key", ["objective.teacher_momentum", "objective.teacher_momentum_end", "optim.lr", "train.epochs"]
    )
    def test_a_whole_number_is_a_number(self, yaml_file, key):
        group, name = key.split(".")
        assert get(load(None, [f"{key}=1"]), key) == 1.0
        assert get(load(yaml_file(f"{group}: {{{name}: 1}}")), key) == 1.0

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("train.steps=500", 500),
            ("train.steps=auto", AUTO),
            ("monitor.health_every=0", 0),
            ("monitor.health_every=auto", AUTO),
            ("views.mean=[0.1,0.2,0.3]", [0.1, 0.2, 0.3]),
            ("views.mean=none", None),
            ("views.global_scale=[0.25, 1]", [0.25, 1.0]),
            ("train.time_limit=90", 90.0),
            ("train.time_limit=none", None),
            ("train.compile=true", True),
            ("tracking.backends=[wandb,tensorboard]", ["wandb", "tensorboard"]),
            ("tracking.backends=[]", []),
            ("tracking.name=2024", "2024"),
            ("model.embed_dim=96", 96),
        ],
    )
    def test_values(self, setting, value):
        found = get(load(None, [setting]), setting.split("=")[0])
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        "text",
        [
            "../a b/c=d",
            "/data/2024-01-01",
            "a: b",
            "007",
            "12e03",
            "yes",
            "x #1",
            "[brackets]",
            "~/x",
        ],
    )
    def test_a_path_is_taken_as_it_is_written(self, text):
        assert load(None, [f"data.root={text}"]).data.root == text

    @pytest.mark.parametrize("text", ["${HOME}/images", "${data.kind}", "???", "${"])
    def test_what_omegaconf_reads_in_a_path_of_its_own_is_no_traceback(self, text):
        """Taken as some text, or refused as a wrong value."""
        try:
            told = load(None, [f"data.root={text}"]).data.root
        except UserError as error:
            told = str(error)
        assert isinstance(told, str)

    @pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
    def test_every_recipe_loads(self, path):
        if path.stem == "curate":
            assert read(CurateConfig, path) == CurateConfig()  # it shows the defaults
        else:
            assert load(path) != Config()


class TestRoundTrip:
    def test_defaults(self, yaml_file):
        assert load(yaml_file(dump(Config()))) == Config()

    def test_every_kind_of_value(self, yaml_file):
        config = Config()
        config.data.root = "C: \\dir #1 é 日本 'quoted'"
        config.tracking.name = "1e-3"
        config.tracking.backends = ["wandb"]
        config.optim.lr, config.optim.lr_end = 1e-5, 1e-12
        config.train.steps, config.train.time_limit = 10**9, 0.5
        config.views.mean = [0.1, 1 / 3, 2e-7]
        config.objective.teacher_momentum = 0.99999999
        config.train.compile = True
        assert load(yaml_file(dump(config))) == config

    def test_every_setting_is_written(self):
        text = dump(Config())
        assert all(f"  {key.split('.')[1]}:" in text for key, _ in leaves(Config()))


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "near"),
        [
            ("train.batchsize", "train.batch_size"),
            ("optim.learning_rate_end", "optim.lr_end"),
            ("model.patchsize", "model.patch_size"),
            ("views.n_local_crops", "views.local_crops"),
        ],
    )
    def test_an_unknown_key_names_the_nearest(self, key, near):
        assert refusal(None, f"{key}=1") == f"unknown key '{key}'; did you mean '{near}'?"

    def test_an_unknown_key_in_a_file(self, yaml_file):
        assert "unknown key 'train.batch'; did you mean 'train.batch_size'?" in refusal(yaml_file("train: {batch: 3}"))
        assert "unknown key 'trian.seed'; did you mean 'train.seed'?" in refusal(yaml_file("trian: {seed: 3}"))
        assert "unknown key 'batch_size'" in refusal(yaml_file("batch_size: 3"))

    @pytest.mark.parametrize(
        ("setting", "wanted"),
        [
            ("train.batch_size=many", "a whole number"),
            ("train.batch_size=2.5", "a whole number"),
            ("train.batch_size=true", "a whole number"),
            ("train.batch_size=[1]", "a whole number"),
            ("train.epochs=long", "a number"),
            ("train.compile=maybe", "true or false"),
            ("train.steps=soon", "auto"),
            ("train.steps=2.5", "auto"),
            ("train.steps=true", "auto"),
            ("optim.lr=fast", "auto"),
            ("objective.teacher_momentum=high", "auto"),
            ("optim.betas=0.9", "list"),
            ("views.global_scale=[small, large]", "list"),
            ("train.time_limit=soon", "none"),
        ],
    )
    def test_a_wrong_type_names_the_key_the_type_and_the_value(self, setting, wanted):
        key, value = setting.split("=")
        text = refusal(None, setting)
        assert key in text
        assert wanted in text
        assert value.strip("[]").split(",")[0].lower() in text.lower()

    def test_text_for_a_number_in_a_file(self, yaml_file):
        assert "optim.lr must be" in refusal(yaml_file("optim: {lr: fast}"))

    @pytest.mark.parametrize(
        ("setting", "near"),
        [
            ("model.arch=vit_smal", "vit_small"),
            ("views.preset=dino2", "dinov2"),
            ("objective.centering=center", "centre"),
            ("optim.name=adam", "adamw"),
            ("data.cache=devise", "device"),
            ("data.kind=omniglot_training", "omniglot_train"),
            ("train.precision=bfloat16", "bf16"),
        ],
    )
    def test_an_unknown_choice_names_all_and_the_nearest(self, setting, near):
        key, value = setting.split("=")
        text = refusal(None, setting)
        assert f"{key} must be one of " in text
        assert f"got '{value}'" in text
        assert f"did you mean '{near}'?" in text

    @pytest.mark.parametrize(
        "setting",
        [
            *("train.batch_size=0", "train.batch_size=-5", "train.accumulation=0", "train.keep_checkpoints=0"),
            *("monitor.log_every=0", "model.patch_size=0", "train.steps=0", "train.checkpoint_every=0"),
            *("optim.lr=0", "optim.lr=-0.1", "optim.lr=nan", "train.epochs=0", "train.epochs=inf"),
            *("objective.student_temperature=0", "objective.teacher_temperature=0"),
            *(
                "objective.teacher_momentum=1.5",
                "objective.center_momentum=-0.1",
                "model.drop_path=1.0",
                "model.drop_path=-0.1",
            ),
            *(
                "views.local_crops=-1",
                "data.workers=-1",
                "monitor.health_every=-1",
                "optim.warmup_steps=-1",
                "data.max_unreadable=2",
            ),
            *("views.global_scale=[0.4]", "views.global_scale=[0.5, 0.4]", "views.local_scale=[0, 0.4]"),
            *("views.local_scale=[0.1, 1.5]", "objective.prototypes=0", "objective.sinkhorn_iterations=0"),
            *(
                "optim.betas=[0.9]",
                "train.seed=-1",
                "views.std=[0.2, 0, 0.2]",
                "optim.betas=[0.9, 1.0]",
                "optim.clip_grad=-1",
                "model.depth=0",
                "model.embed_dim=0",
            ),
        ],
    )
    def test_a_value_that_cannot_work_names_its_key(self, setting):
        assert setting.split("=")[0] in refusal(None, setting)

    @pytest.mark.parametrize(
        "settings", [["model.embed_dim=100", "model.num_heads=3"], ["model.embed_dim=100"], ["model.num_heads=7"]]
    )
    def test_a_width_that_heads_cannot_share(self, settings):
        """Also where one of the two is the arch's own: vit_small has 384 and 6."""
        text = refusal(None, *settings)
        assert "model.embed_dim" in text
        assert "model.num_heads" in text

    def test_all_errors_are_listed_at_once(self):
        unknown = refusal(None, "train.batchsize=3", "train.seed=x", "model.depht=2", "train.epochs=9")
        assert all(text in unknown for text in ("train.batchsize", "train.seed", "model.depht"))
        assert "3 " in unknown.splitlines()[0]
        assert len(unknown.splitlines()) == 4
        impossible = refusal(None, "train.batch_size=0", "model.arch=vgg", "views.local_crops=-1")
        assert all(text in impossible for text in ("train.batch_size", "model.arch", "views.local_crops"))

    def test_an_argument_without_a_value(self):
        assert "write key=value" in refusal(None, "train.batch_size")

    @pytest.mark.parametrize(
        ("sizes", "texts"),
        [
            (["views.global_size=225"], ["views.global_size=225", "224 or 240"]),
            (["views.local_size=100"], ["views.local_size=100", "96 or 112"]),
            (["views.global_size=224", "model.patch_size=14"], ["views.local_size=96", "84 or 98"]),
            (["views.local_size=8"], ["views.local_size=8 is smaller than one patch", "model.patch_size=16"]),
        ],
    )
    def test_sizes_that_patches_do_not_fill_name_those_that_they_do(self, sizes, texts):
        text = refusal(None, *sizes)
        assert all(part in text for part in texts)

    def test_sizes_do_not_matter_where_there_are_no_patches_or_no_crops(self):
        assert (
            load(None, ["model.arch=resnet50", "views.global_size=225", "views.local_size=97"]).views.local_size == 97
        )
        assert load(None, ["views.local_crops=0", "views.local_size=97"]).views.local_size == 97

    def test_a_batch_that_micro_batches_cannot_share(self):
        text = refusal(None, "train.batch_size=100", "train.accumulation=3")
        assert "train.batch_size=100" in text
        assert "train.accumulation=3" in text

    @pytest.mark.parametrize("content", ["train: {batch_size: [", "a: b: c", "\t- x", "key: @value"])
    def test_broken_yaml(self, yaml_file, content):
        assert "config.yaml is not valid YAML" in refusal(yaml_file(content))

    @pytest.mark.parametrize("content", ["[1, 2]", "just text", "3"])
    def test_yaml_without_groups(self, yaml_file, content):
        text = refusal(yaml_file(content))
        assert "must hold groups of settings" in text
        assert "train" in text

    def test_a_binary_file(self, tmp_path):
        (tmp_path / "weights.yaml").write_bytes(bytes(range(256)))
        assert "weights.yaml is not valid YAML" in refusal(tmp_path / "weights.yaml")

    def test_no_such_file(self, tmp_path):
        assert "cannot read the config" in refusal(tmp_path / "missing.yaml")
        assert "cannot read the config" in refusal(tmp_path)

    def test_checking_accepts_what_auto_leaves_open(self):
        check(Config())


class TestHelp:
    def test_table_says_key_default_and_meaning_of_every_setting(self):
        text = describe(Config())
        for key, field in leaves(Config()):
            assert f"  {key} (" in text
            assert field.metadata["meaning"] in text
            for choice in field.metadata["choices"]:
                assert choice in text
        assert "default 256" in text

    def test_pretrain_prints_it(self, monkeypatch, capsys):
        spec = importlib.util.spec_from_file_location("pretrain", REPOSITORY / "train" / "pretrain.py")
        pretrain = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pretrain)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
        with pytest.raises(SystemExit) as caught:
            pretrain.parse()
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert all(f"  {key} (" in text for key, _ in leaves(Config()))
        assert describe(Config()) in text
