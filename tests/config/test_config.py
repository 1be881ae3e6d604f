"""Settings: the paper's defaults, files and overrides, and a clear line for everything that is wrong."""

from __future__ import annotations

import pytest

from mpies import config, time_limit
from mpies.errors import InputError

FILE = """\
model: {path: some/model}
run: {directory: runs/some}
"""


@pytest.fixture
def write(tmp_path):
    """write(text or bytes) -> path of a configuration file, as the command line has it."""

    def make(content: str | bytes) -> str:
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


def refusal(*arguments: str) -> list[str]:
    """The lines of the message with which arguments are refused."""
    with pytest.raises(InputError) as error:
        config.load(list(arguments))
    lines = str(error.value).splitlines()
    for line in lines:
        # A library's way to put it says nothing to the user.
        for jargon in ("dictionary", "instance of", "Input should", "Keys should", "pydantic", "<unicode"):
            assert jargon not in line
    return lines


def the_line(*arguments: str) -> str:
    (line,) = refusal(*arguments)
    return line


# What settings are


def test_defaults_are_the_papers(write):
    """arXiv 2509.24372: Countdown's column of the table of hyper-parameters."""
    settings = config.load([write(FILE)])
    assert settings.es.population == 30
    assert settings.es.generations == 500
    assert settings.es.sigma == 0.001
    assert settings.es.alpha == 0.0005
    assert not settings.es.antithetic  # mirrored sampling is left out on purpose
    assert settings.es.perturbation == "full"
    assert settings.es.fitness == "zscore"
    assert settings.engine.max_new_tokens == 1024
    assert not settings.model.allow_download


def test_file_then_overrides(write):
    path = write(FILE + "es: {sigma: 0.5, alpha: 0.25}\n")
    settings = config.load(["es.sigma=0.125", path, "es.population=8", "es.sigma=1"])
    assert (settings.es.sigma, settings.es.alpha, settings.es.population) == (1, 0.25, 8)
    assert settings.model.path == "some/model"
    assert settings.es.generations == 500


def test_without_a_file_the_quickstart(write):
    settings = config.load([])
    assert settings.model.path == "quickstart"
    assert (settings.task.name, settings.task.prompts_per_generation) == ("questions", 8)
    assert (settings.es.population, settings.es.perturbation) == (32, "lowrank")
    assert config.load(["es.sigma=0.5"]).es.sigma == 0.5
    assert config.load(["es.sigma=0.5"]).es.alpha == settings.es.alpha
    # Its values are no defaults of other runs.
    assert not config.load([write(FILE)]).es.antithetic


@pytest.mark.parametrize(
    "override, value",
    [
        ("es.sigma=1e-3", 0.001),
        ("es.sigma=1E-3", 0.001),
        ("es.sigma=.5", 0.5),
        ("es.sigma=1", 1),
        ("es.alpha=0", 0),
        ("es.seed=0", 0),
        ("es.seed=18446744073709551615", 2**64 - 1),
        ("es.antithetic=false", False),
        ("es.antithetic=True", True),
        ("es.generations=0", 0),
        ("model.path=a=b", "a=b"),
        ("model.path=no", "no"),
        ("model.path=Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
        # Words that look like numbers: run.directory=$SLURM_JOB_ID
        ("run.directory=4711", "4711"),
        ("run.directory=1e5", "1e5"),
        ("model.path=2024-01-01", "2024-01-01"),
        ("run.directory=@scratch/run [1]", "@scratch/run [1]"),
    ],
)
def test_values_on_the_command_line(override, value):
    key = override.split("=")[0]
    made = config.load([override]).flat()[key]
    assert made == value and isinstance(made, type(value) if type(value) is not int else (int, float))


def test_keys_and_flat_agree():
    names = config.keys()
    assert list(config.load([]).flat()) == names
    assert "es.sigma" in names


JOB = (
    "model.path",
    "model.dtype",
    "model.base",
    "model.device",
    "model.allow_download",
    "es.generations",
    "run.directory",
    "run.assignment",
    "run.evaluate_every",
    "run.keep_samples",
    "run.kl_samples",
    "run.kl_prompts",
    "run.measure_drift",
    "run.progress",
    "run.metrics",
    "run.slurm_comment",
    "run.resume",
    "run.changed_reward",
    "run.checkpoint_every",
    "run.time_limit",
    "run.grace",
    "run.collective_timeout",
)
DATA = ("task.train_data", "task.eval_data")


def test_what_settings_decide():
    """Nothing that decides the result may change in a run, or be overlooked when runs are compared."""
    names = config.keys()
    roles = {key: config.role_of(key) for key in names}
    assert [key for key, role in roles.items() if role is config.Role.JOB] == list(JOB)
    assert [key for key, role in roles.items() if role is config.Role.DATA] == list(DATA)
    assert set(config.CHANGEABLE) == {*JOB, *DATA}


@pytest.mark.parametrize("key, role", [("run.new", "JOB"), ("es.new", "RESULT"), ("new.new", "RESULT")])
def test_settings_of_other_versions_are_as_their_section(key, role):
    assert config.role_of(key) is config.Role[role]


def test_every_setting_is_described():
    text = config.describe()
    for key in config.load([]).flat():
        assert f"  {key}: " in text
    for section in config.Settings.model_fields.values():
        for info in section.annotation.model_fields.values():
            assert info.description


@pytest.mark.parametrize("columns", [50, 120])
def test_the_description_fits_the_terminal_and_says_what_is_allowed(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = config.describe()
    assert columns - 12 < max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    for said in (
        "(default hf; hf | vllm)",
        "(default 30; a whole number from 1 up to 10000000)",
        "true or false",
    ):
        assert said in words


def test_settings_cannot_be_changed():
    settings = config.load([])
    with pytest.raises(ValueError, match="frozen"):
        settings.es.sigma = 1.0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["es.sigma=1e-05", "es.alpha=0.1", "es.seed=18446744073709551615"],
        ['model.path=/data/Müller\'s "model" #1: {x}', "run.directory=" + "very-long/" * 30],
        ["model.path='4711'", "run.directory='null'"],
        ["es.sigma=0.30000000000000004", "es.alpha=1"],
    ],
)
def test_yaml_round_trip(write, overrides):
    settings = config.load(overrides)
    text = settings.to_yaml()
    assert config.load([write(text)]) == settings
    assert config.from_yaml(text) == settings
    assert config.load([write(text)]).to_yaml() == text


def test_yaml_is_in_the_order_of_the_settings():
    text = config.load([]).to_yaml()
    sections = [line.split(":")[0] for line in text.splitlines() if line and not line.startswith(" ")]
    assert sections == list(config.Settings.model_fields)
    assert text.index("population:") < text.index("alpha:")


# What is refused


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--sigma", "3"], "--sigma: settings are written es.sigma=VALUE, without dashes"),
        (["--es.sigma", "3"], "--es.sigma: settings are written es.sigma=VALUE"),
        (["es.sigma", "3"], "es.sigma: settings are written es.sigma=VALUE"),
        (["--verbose"], "--verbose: settings are written section.key=VALUE"),
        (["es=3"], "es: a section, no setting; its settings are written es.NAME=VALUE"),
    ],
    ids=" ".join,
)
def test_settings_that_are_written_as_something_else(arguments, says):
    (line,) = refusal(*arguments)
    assert line.startswith(says)


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("es.sigmaa", "es.sigma"),
        ("es.populatoin", "es.population"),
        ("sigma", "es.sigma"),
        ("population", "es.population"),
        ("ess.sigma", "es.sigma"),
        ("engine.sigma", "es.sigma"),
        ("ES.Sigma", "es.sigma"),
        ("--es.sigma", "es.sigma"),
        ("engnie.batch_size", "engine.batch_size"),
        ("run.dir", "run.directory"),
        ("model.pth", "model.path"),
    ],
)
def test_unknown_keys_have_a_nearest_name(write, key, nearest):
    assert the_line(f"{key}=1") == f"{key}: no such setting; did you mean {nearest}?"


@pytest.mark.parametrize("key", ["es.temperature", "temperature", "", "es.", ".", "xyz.abc"])
def test_unknown_keys_without_a_near_name(key):
    line = the_line(f"{key}=1")
    assert "no such setting; --help lists all settings" in line
    assert "did you mean" not in line


@pytest.mark.parametrize(
    "text, key, nearest",
    [
        ("es: {sigmaa: 1}", "es.sigmaa", "es.sigma"),
        ("sigma: 1", "sigma", "es.sigma"),
        ("ess: {sigma: 1}", "ess", "es"),
        ("engin: {name: hf}", "engin", "engine"),
    ],
)
def test_unknown_keys_in_a_file(write, text, key, nearest):
    line = the_line(write(FILE + text))
    assert line.startswith(f"{key}: no such ")
    assert line.endswith(f"; did you mean {nearest}?")


@pytest.mark.parametrize(
    "override, given, allowed",
    [
        ("es.population=thirty", "'thirty'", "integer"),
        ("es.population=3.5", "3.5", "integer"),
        ("es.population=true", "True", "integer"),
        ("es.population='30'", "'30'", "integer"),
        ("es.population=[30]", "[30]", "integer"),
        ("es.population=", "None", "integer"),
        ("es.population=0", "0", "greater than or equal to 1"),
        ("es.population=1000000000000", "1000000000000", "less than or equal to 10000000"),
        ("es.generations=1000000000000", "1000000000000", "less than or equal to 10000000"),
        ("es.sigma=0", "0", "greater than 0"),
        ("es.sigma=-1", "-1", "greater than 0"),
        ("es.sigma=nan", "nan", "number"),
        ("es.sigma=.nan", "nan", "finite number"),
        ("es.sigma=inf", "inf", "number"),
        ("es.sigma=1e400", "inf", "finite number"),
        ("es.sigma=fast", "'fast'", "number"),
        ("es.sigma=true", "True", "number"),
        ("es.alpha=-0.1", "-0.1", "greater than or equal to 0"),
        ("es.seed=-1", "-1", "greater than or equal to 0"),
        ("es.seed=18446744073709551616", "18446744073709551616", "less than 18446744073709551616"),
        ("es.antithetic=yes", "'yes'", "true or false"),
        ("es.antithetic=1", "1", "true or false"),
        ("task.name=chess", "'chess'", "conciseness"),
        ("model.dtype=bf16", "'bf16'", "'auto', 'bfloat16', 'float16' or 'float32'"),
        ("engine.batch_size=0", "0", "greater than or equal to 1"),
        ("engine.max_new_tokens=0", "0", "greater than or equal to 1"),
        ("engine.batch_invariant=true", "true", "false with engine.name=hf"),
        ("run.threads=0", "0", "greater than or equal to 1"),
        ("task.environment=games.py", "'games.py'", "FILE.py:CLASS"),
        ("task.environment_factory=[a.py:B]", "['a.py:B']", "a mapping NAME: FILE.py:CLASS"),
        ("task.environment_factory={a: 3}", "{'a': 3}", "a mapping NAME: FILE.py:CLASS"),
        ("task.tools=tools", "'tools'", "FILE.py:FUNCTION"),
        ("task.agent=agent.py", "'agent.py'", "FILE.py:FUNCTION"),
        ("task.max_turns=0", "0", "greater than or equal to 1"),
    ],
)
def test_wrong_values(override, given, allowed):
    """The key's full name, what was given, what is allowed."""
    key = override.split("=")[0]
    line = the_line(override)
    assert line.startswith(f"{key}: given ")
    before, after = line.split(", allowed is ")
    assert given in before
    assert allowed in after


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ["task.environment=a.py:B", "task.tools=c.py:d"],
            "task.environment: given 'a.py:B', allowed is none",
        ),
        (
            ["task.tools=c.py:d", "task.chat_template=false"],
            "task.chat_template: given false, allowed is true",
        ),
        (["task.agent=a.py:b", "task.tools=c.py:d"], "task.agent: given 'a.py:b', allowed is none"),
        (
            ["task.agent=a.py:b", "task.chat_template=false"],
            "task.chat_template: given false, allowed is true",
        ),
        (["task.environment=a.py:B", "task.name=math"], "task.name: given math, allowed is custom"),
    ],
)
def test_what_does_not_go_with_an_environment(overrides, said):
    with pytest.raises(InputError) as error:
        config.load(["model.path=a", "run.directory=b", *overrides])
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("given", ["1.5", "soon", "-5", "1:2:3:4", "true"])
def test_wrong_time_limits(given):
    """Their format is the time_limit module's business."""
    with pytest.raises(InputError) as error:
        time_limit.seconds_of(config.load([f"run.time_limit={given}"]).run.time_limit)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"run.time_limit: given '{given}', allowed is auto, none, minutes")


@pytest.mark.parametrize("text, seconds", [("90", 5400), ("1:30:00", 5400), ("none", None)])
def test_time_limits_in_a_file_and_on_the_command_line(write, text, seconds):
    for arguments in (
        [write(FILE), f"run.time_limit={text}"],
        [write(FILE[:-2] + f", time_limit: {text}}}\n")],
    ):
        assert time_limit.seconds_of(config.load(arguments).run.time_limit) == seconds


def test_wrong_values_in_a_file(write):
    path = write(FILE + "es: {population: 3.0, seed: '7'}\nengine: {batch_size: ~}\n")
    lines = refusal(path)
    assert [line.split(":")[0] for line in lines] == ["es.population", "es.seed", "engine.batch_size"]


@pytest.mark.parametrize("population", [1, 7, 31])
def test_antithetic_members_come_in_pairs(write, population):
    overrides = [f"es.population={population}", "es.antithetic=true"]
    line = the_line(write(FILE), *overrides)
    assert line.startswith("es.population: ")
    assert str(population) in line and "even" in line and "antithetic" in line
    assert config.load([write(FILE), overrides[0]]).es.population == population


def test_required_settings(write):
    lines = refusal(write("es: {sigma: 0.1}\n"))
    assert [line.split(":")[0] for line in lines] == ["model.path", "run.directory"]
    assert "missing" in lines[0] and "model.path=VALUE" in lines[0]
    settings = config.load([write("es: {sigma: 0.1}\n"), "model.path=m", "run.directory=d"])
    assert (settings.model.path, settings.run.directory) == ("m", "d")


@pytest.mark.parametrize("text", ["es:\n", "es: {}\n", "es:\n  # sigma: 0.1\n"])
def test_an_empty_section_is_all_defaults(write, text):
    assert config.load([write(FILE + text)]).es.population == 30


@pytest.mark.parametrize("text", ["es: 3\n", "es: [sigma]\n", "es: sigma\n"])
def test_a_section_that_is_none(write, text):
    assert the_line(write(FILE + text)).startswith("es: ")


def test_several_problems_are_a_line_each(write):
    path = write("es: {sigma: 0, populatoin: 3}\nmodel: {path: m}\nrun: {directory: 3, thread: 1}\n")
    starts = {line.split(":")[0] for line in refusal(path)}
    assert starts == {"es.sigma", "es.populatoin", "run.directory", "run.thread"}


def test_several_problems_on_the_command_line_are_a_line_each():
    lines = refusal("es.sigma=0", "es.sigmaa=1", "es.populatoin=3", "engine.batch_size=x")
    assert {line.split(":")[0] for line in lines} == {
        "es.sigma",
        "es.sigmaa",
        "es.populatoin",
        "engine.batch_size",
    }


def test_two_files(write):
    path = write(FILE)
    line = the_line(path, "other.yaml")
    assert "one configuration file at most" in line
    assert path in line and "other.yaml" in line


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n\x00\xff\xfe"), "not a text file"),
        (lambda path: path.write_bytes("es: {}".encode("utf-16")), "not a text file"),
    ],
    ids=["missing", "directory", "binary", "utf-16"],
)
def test_file_that_cannot_be_read(tmp_path, make, reason):
    path = tmp_path / "some.yaml"
    make(path)
    line = the_line(str(path), "es.sigma=0.1")
    assert line.startswith(f"{path}: ") and reason in line


@pytest.mark.parametrize(
    "text, where",
    [
        ("es: [1\n", "line 2"),
        ("es:\n\tsigma: 1\n", "line 2"),
        ("model: {path: x}\nes: {sigma: 1, sigma: 2}\n", "line 2"),
        ("a: b: c\n", "line 1"),
        ("es: *nothing\n", "line 1"),
        ("es: {}\n---\nes: {}\n", "line 2"),
        ("run: !!python/object/apply:os.system ['true']\n", "line 1"),
        ("model: {path: x\0y}\n", ""),
        ("model: {path: x\x1b[31my}\n", ""),
    ],
    ids=["open", "tab", "twice", "colons", "alias", "two", "python", "nul", "escape"],
)
def test_file_that_is_not_yaml(write, text, where):
    path = write(text)
    line = the_line(path)
    assert line.startswith(f"{path}: ") and where in line and "not valid YAML" in line


@pytest.mark.parametrize("text", ["", "# nothing\n", "~\n", "- es\n- run\n", "es\n", "3\n"])
def test_file_without_sections(write, text):
    path = write(text)
    line = the_line(path)
    assert line.startswith(f"{path}: ") and "model, task, es, engine, run" in line


NINE = ", ".join(["x"] * 9)
BOMB = f"a: &a [{NINE}]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh")
)
HOSTILE = {
    "code": (
        "model: !!python/object/apply:os.system ['echo hi']\n",
        "line 1 not valid YAML (could not determine",
    ),
    "name": ("model: {path: !!python/name:os.system ''}\n", "line 1 not valid YAML (could not determine"),
    "tag": ("model: !mine {path: x}\n", "line 1 not valid YAML"),
    "bomb": (BOMB, "it holds more than 10,000 values, those that aliases repeat included"),
    "bomb in a setting": (BOMB.replace("h:", "model:"), "it holds more than 10,000 values"),
    "itself": ("model: &a\n  path: *a\n", "it holds more than 10,000 values"),
    "deep": ("[" * 3000, "not valid YAML (brackets within brackets, too deep)"),
    "deep mapping": ("{a: " * 3000, "not valid YAML (brackets within brackets, too deep)"),
    "long": ("# " + "x" * 1_000_000, "it has more than 1,000,000 characters"),
    "digits": (f"es: {{seed: 1{'0' * 5000}}}\n", "not valid YAML (Exceeds the limit"),
    "twice": ("model: {path: x}\nmodel: {path: y}\n", "line 2 not valid YAML (found duplicate key"),
    "documents": ("model: {path: x}\n---\nmodel: {path: y}\n", "line 2 not valid YAML"),
    "version": ("%YAML 3.0\n---\nmodel: {path: x}\n", "line 1 not valid YAML"),
    "list": ("[model, task]\n", "expected sections (model, task, es, engine, run) with settings"),
    "nothing": ("", "expected sections"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_yaml_that_is_none_or_hostile_is_one_short_line(write, kind):
    """In a configuration as in the settings that a run file holds, which others may have written."""
    text, words = HOSTILE[kind]
    path = write(text)
    with pytest.raises(InputError) as error:
        config.from_yaml(text)
    for line, what in ((the_line(path), path), (str(error.value), "the settings in the run file")):
        assert line.startswith(f"{what}: {words}"), line
        assert len(line) < 400 + len(path) and "\n" not in line


@pytest.mark.parametrize(
    "given",
    [
        "es.sigma=[" + "a, " * 5000 + "]",
        "es.sigma=" + "7" * 5000,
        "es.sigma=" + "x" * 5000,
        "es.sigma=0b1" + "1" * 70_000,
        "es.sigma={" + ", ".join(f"a{i}: {{b: [1, 2, 3, 4, 5, 6, 7, 8, 9]}}" for i in range(500)) + "}",
        "es.sigma=" + "[" * 3000,
        "task.reward=[" + "5, " * 5000 + "]",
        "run.time_limit=" + "x" * 5000,
        f"es.{'x' * 5000}=1",
    ],
    ids=lambda given: given[:20],
)
def test_what_was_given_is_shortened(given):
    line = the_line(given)
    assert line.startswith(given.split("=")[0][:100]) and len(line) < 600


@pytest.mark.parametrize("text", ["\\0", "\\ud800"])
def test_text_that_names_no_file(write, text):
    line = the_line(write(f'model: {{path: "a{text}"}}\nrun: {{directory: x}}\n'))
    assert line.startswith("model.path: given 'a\\") and line.endswith(
        "text in UTF-8 without null characters"
    )
    line = the_line(write(FILE), "run.directory=a" + {"\\0": "\0"}.get(text, "\udc80"))
    assert line.startswith("run.directory: given 'a\\")


@pytest.mark.parametrize("text", ["1: 2\n", "es: {1: 2}\n", "~: 3\n", "[a, b]: 3\n"])
def test_keys_that_are_no_words(write, text):
    assert "no such setting" in the_line(write(FILE + text))


@pytest.mark.parametrize("bom, newline", [("\ufeff", "\n"), ("", "\r\n")])
def test_files_of_other_systems(write, bom, newline):
    settings = config.load([write(bom + FILE.replace("\n", newline))])
    assert settings.model.path == "some/model"


# Going on with a run


def test_settings_that_stay():
    before = config.load([])
    now = config.load(["es.sigma=0.5", "task.chat_template=false", "run.threads=2"])
    with pytest.raises(InputError) as error:
        config.refuse_changes(before, now)
    *lines, remedy = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["task.chat_template", "es.sigma", "run.threads"]
    assert "0.01" in lines[1] and "0.5" in lines[1]
    assert "run.directory" in remedy


def test_settings_that_may_change():
    changed = ["model.path=elsewhere", "es.generations=1000", "run.directory=moved", "run.keep_samples=0"]
    config.refuse_changes(config.load([]), config.load(changed))
    config.refuse_changes(config.load(changed), config.load([]))


@pytest.mark.parametrize(
    "given, paths",
    [
        ([], ["auto"]),
        (["es.leave_out=[]"], []),
        (["es.leave_out=model.visual"], ["model.visual"]),
        (["es.leave_out=[auto, lm_head]"], ["auto", "lm_head"]),
    ],
)
def test_what_is_left_out_is_a_name_or_a_list(write, given, paths):
    settings = config.load([write(FILE), *given])
    assert settings.es.leave_out == paths
    assert config.from_yaml(settings.to_yaml()).es.leave_out == paths
    assert the_line(write(FILE), "es.leave_out=['a b']").startswith("es.leave_out")
