"""The `mvmr` command: a literal table of subcommands, each imported only when it is run."""

from importlib import import_module
from typing import Any

import click

from mvmr import __version__
from mvmr.errors import MvmrError, missing_extra, unknown
from mvmr.storage.atomic import is_disk_full

# Name -> (where the click command lives, one line for `mvmr --help`), in the order of work.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("mvmr.distillation.cli:quickstart", "Run the whole path on sample images, in minutes."),
    "distill": ("mvmr.distillation.cli:distill", "Distil a teacher into a student, from unlabelled images."),
    "pretrain": ("mvmr.cli.commands:pretrain", "Train a student without a teacher (self-supervised)."),
    "probe": ("mvmr.cli.commands:probe", "Fit a linear head on frozen features and store it in the bundle."),
    "finetune": ("mvmr.cli.commands:finetune", "Fine-tune the whole encoder on few labels."),
    "evaluate": ("mvmr.distillation.cli:evaluate", "Measure a bundle, alone or beside its teacher."),
    "report": ("mvmr.distillation.cli:report", "Show how faithful a student is to its teacher, on a page."),
    "ablate": ("mvmr.cli.commands:ablate", "Run the paper's ablations."),
    "export": ("mvmr.export.cli:export", "Export a student to ONNX or TensorRT, verified on real images."),
    "embed": ("mvmr.serve.jobs_cli:embed", "Embed many images to Parquet, resumable."),
    "index": ("mvmr.serve.jobs_cli:index", "Index embeddings, to find the nearest."),
    "search": ("mvmr.serve.jobs_cli:search", "Find the images of an index nearest to one."),
    "serve": ("mvmr.serve.cli:serve", "Serve embeddings over HTTP."),
    "app": ("mvmr.app.cli:app", "Compare teacher and student in the browser."),
    "bench": ("mvmr.export.cli:bench", "Measure speed on this machine."),
    "info": ("mvmr.cli.commands:info", "Show what a bundle is and how it was made."),
    "doctor": ("mvmr.cli.doctor:doctor", "Show what this machine has, and what each command lacks."),
}

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
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
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
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:  # Any: click's own signature
        """Run the subcommand, and end in one line where the user can mend what went wrong."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            _end(ctx, error, f"stopped: {error}" if error.args else "stopped", EXIT_INTERRUPTED)
        except MvmrError as error:
            _end(ctx, error, f"error: {error}", EXIT_ERROR)
        except ModuleNotFoundError as error:
            if (extra := missing_extra(error)) is None:
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
