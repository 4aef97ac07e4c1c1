import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from mvmr import __version__
from mvmr.cli.main import main
from mvmr.cli.table import COMMANDS, Entry
from mvmr.errors import MvmrError, unknown

HEAVY = ("torch", "torchvision", "numpy", "sklearn", "skimage", "open_clip", "lightning_fabric")


@pytest.fixture
def boom(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make `mvmr boom` a command that raises the given exception."""

    def install(error: BaseException, extra: str | None = None) -> None:
        @click.command()
        def command() -> None:
            raise error

        module = ModuleType("boom_module")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "boom_module", module)
        monkeypatch.setitem(COMMANDS, "boom", Entry("boom_module:command", "Fail.", extra))

    return install


def loaded_after(code: str) -> set[str]:
    """Run `code` in a fresh interpreter and return which heavy packages it has imported."""
    program = f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("extra", "advice"), [("train", "train"), ("export", "export"), ("app", "app"), (None, "train")]
)
def test_what_lacks_a_package_advises_the_extra_of_its_command(
    boom: Callable[..., None], extra: str | None, advice: str
) -> None:
    boom(ModuleNotFoundError("No module named 'torch'", name="torch"), extra)
    result = CliRunner().invoke(main, ["boom"])
    assert result.exit_code == 1
    assert result.stderr == f"error: this needs the package 'torch', not installed here: pip install 'mvmr[{advice}]'\n"


def test_help_lists_every_command_and_imports_none() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, entry in COMMANDS.items():
        assert name in result.output
        assert entry.line in result.output
    assert loaded_after("from mvmr.cli.main import main; main(['--help'], standalone_mode=False)") == set()


def test_every_command_loads_without_torch() -> None:
    imports = "from mvmr.cli.main import main; from mvmr.cli.table import COMMANDS"
    code = f"{imports}\nfor name in COMMANDS: main([name, '--help'], standalone_mode=False)"
    assert not loaded_after(code) & {"torch", "torchvision", "open_clip", "sklearn"}


def test_recipes_are_listed_and_misspelt_without_torch() -> None:
    calls = [["list"], ["show", "papr"], *([name, "--help"] for name in ("list", "show", "diff"))]
    code = f"from click.testing import CliRunner; from mvmr.cli.main import main\nfor argv in {calls}: "
    assert loaded_after(f"{code}CliRunner().invoke(main, ['recipe', *argv])") == set()


def test_reading_a_bundle_needs_no_torch() -> None:
    loaded = loaded_after("import mvmr.bundles.bundle, mvmr.config, mvmr.bundles.model_card, mvmr.bundles.preprocess")
    assert not loaded - {"numpy"}


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"mvmr {__version__}\n"


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mvmr", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mvmr {__version__}\n"


def test_unknown_command_suggests_the_nearest() -> None:
    result = CliRunner().invoke(main, ["distil", "--data", "x"])
    assert result.exit_code == 2
    assert "unknown command 'distil'; did you mean 'distill'?" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MvmrError("no images in\n photos/"), 1, "error: no images in photos/"),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt("step 3 is saved"), 130, "stopped: step 3 is saved"),
        (
            ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"),
            1,
            "error: this needs the package 'torch', not installed here: pip install 'mvmr[train]'",
        ),
        (
            RuntimeError("No space left on device"),
            1,
            "error: disk full: No space left on device; free some space and run again",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    boom: Callable[[BaseException], None], error: BaseException, code: int, line: str
) -> None:
    boom(error)
    result = CliRunner().invoke(main, ["boom"])
    assert result.exit_code == code
    assert result.stderr == line + "\n"
    assert result.stdout == ""
    traced = CliRunner().invoke(main, ["--debug", "boom"])
    assert traced.exit_code == code
    assert "Traceback" in traced.stderr
    assert traced.stderr.endswith(line + "\n")


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), ModuleNotFoundError("gone", name="mvmr.gone")])
def test_a_programming_error_keeps_its_trace(boom: Callable[[BaseException], None], error: Exception) -> None:
    boom(error)
    assert CliRunner().invoke(main, ["boom"]).exception is error


def test_unknown_names_the_nearest_and_cuts_a_long_list() -> None:
    assert str(unknown("recipe", "PAPR", ["default", "paper"])) == (
        "unknown recipe 'PAPR'; did you mean 'paper'? Known: default, paper"
    )
    assert str(unknown("size", "q", (str(i) for i in range(20)))).endswith("9, 10, 11 and 8 more")
    assert str(unknown("head", "x", [])) == "unknown head 'x'; Known: none"
