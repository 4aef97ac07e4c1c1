"""The `mvmr` command: finds its subcommands in the table, and ends in one line where a user can mend what is wrong."""

from importlib import import_module
from typing import Any

import click

from mvmr import __version__
from mvmr.cli.table import COMMANDS
from mvmr.errors import MvmrError, missing_extra, unknown
from mvmr.storage.atomic import is_disk_full

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class LazyGroup(click.Group):
    """A group that knows its subcommands by name and imports one when it is called.

    It also turns what a user can mend into one line on stderr and an exit code; `--debug` keeps the trace.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table, without importing anything."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand, None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].home.partition(":")
        command = getattr(import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{attribute} is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; an unknown name is a usage error that suggests the nearest one."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(str(unknown("command", args[0], COMMANDS)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands by the table's own lines, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.line) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:  # Any: click's own signature
        """Run the subcommand, and end in one line where the user can mend what went wrong."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            _end(ctx, error, f"stopped: {error}" if error.args else "stopped", EXIT_INTERRUPTED)
        except MvmrError as error:
            _end(ctx, error, f"error: {error}", EXIT_ERROR)
        except ModuleNotFoundError as error:
            entry = COMMANDS.get(ctx.invoked_subcommand or "")
            if (extra := missing_extra(error, entry.extra if entry else None)) is None:
                raise
            _end(ctx, error, f"error: {extra}", EXIT_ERROR)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            if not is_disk_full(error):
                raise
            _end(ctx, error, f"error: disk full: {error}; free some space and run again", EXIT_ERROR)


def _end(ctx: click.Context, error: BaseException, line: str, code: int) -> None:
    if ctx.params.get("debug"):
        import traceback  # here, for it takes a tenth of the time of `mvmr --help`

        traceback.print_exception(error)
    click.echo(" ".join(line.split()), err=True)
    ctx.exit(code)


@click.group(cls=LazyGroup, epilog="First time here? Run: mvmr quickstart")
@click.option("--debug", is_flag=True, help="Show the full trace of an error.")
@click.version_option(__version__, prog_name="mvmr", message="%(prog)s %(version)s")
def main(debug: bool) -> None:
    """Distil a large vision teacher into a small student, from unlabelled images."""
