"""How many threads compute: as asked for, as the environment says, or as cores are free; said once, after refusals."""

import os

import click
import pytest
from click.testing import CliRunner, Result

from mvmr.cli import threads
from mvmr.cli.commands import finetune, pretrain, probe
from mvmr.cli.main import main
from mvmr.cli.threads import THREADS, note_threads

NOTE = "3 of 4 cores are busy with other work: computing with 1 (--threads)\n"


@click.command()
@THREADS
def compute() -> None:
    note_threads()
    click.echo(os.environ["OMP_NUM_THREADS"])


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, of which one is free, and no word of threads in the environment; what is set is taken back."""
    for name in threads._VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "free_cores", lambda: 1)
    monkeypatch.setitem(threads.sys.modules, "torch", type("Torch", (), {"set_num_threads": lambda count: None}))


def run(*options: str) -> Result:
    result = CliRunner().invoke(compute, options)
    assert result.exit_code == 0, result.output
    return result


def test_cores_that_are_free_compute_and_it_is_said(busy: None) -> None:
    result = run()
    assert (result.stdout, result.stderr) == ("1\n", NOTE)


def test_what_is_asked_for_or_set_is_taken_without_a_word(busy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--threads", "3").output == "3\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run().output == "2\n"
    assert run("--threads", "4").output == "4\n"


def test_free_cores_are_nothing_to_talk_about(busy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: 4)
    assert run().output == "4\n"


def test_a_refusal_is_one_line_also_on_a_busy_machine(busy: None) -> None:
    result = CliRunner().invoke(main, ["probe", "/no/bundle", "--data", "x"])
    assert result.exit_code == 1
    assert result.stderr == "error: no bundle at /no/bundle: there is no such folder\n"


@pytest.mark.parametrize("command", [pretrain, probe, finetune])
def test_commands_that_compute_take_threads(command: click.Command) -> None:
    assert "--threads" in {text for parameter in command.params for text in parameter.opts}
