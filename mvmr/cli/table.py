"""The subcommands of `mvmr`, in the order of work; each is imported only when it is run."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A subcommand.

    home: module and name of the click command; line: what `mvmr --help` says of it
    extra: of the package, that it needs; None for a bare install
    """

    home: str
    line: str
    extra: str | None = None


COMMANDS = {
    "quickstart": Entry(
        "mvmr.distillation.cli:quickstart", "Run the whole path on sample images, in minutes.", "train"
    ),
    "distill": Entry(
        "mvmr.distillation.cli:distill", "Distil a teacher into a student, from unlabelled images.", "train"
    ),
    "pretrain": Entry("mvmr.cli.commands:pretrain", "Train a student without a teacher (self-supervised).", "train"),
    "probe": Entry(
        "mvmr.cli.commands:probe", "Fit a linear head on frozen features and store it in the bundle.", "train"
    ),
    "finetune": Entry("mvmr.cli.commands:finetune", "Fine-tune the whole encoder on few labels.", "train"),
    "evaluate": Entry("mvmr.distillation.cli:evaluate", "Measure a bundle, alone or beside its teacher.", "train"),
    "report": Entry(
        "mvmr.distillation.cli:report", "Show how faithful a student is to its teacher, on a page.", "train"
    ),
    "compare": Entry(
        "mvmr.cli.commands:compare", "Train several methods on the same images and measure each.", "train"
    ),
    "ablate": Entry("mvmr.cli.commands:ablate", "Run the paper's ablations.", "train"),
    "recipe": Entry("mvmr.cli.recipes:recipe", "List recipes, print one in full, compare two.", "train"),
    "export": Entry(
        "mvmr.export.cli:export", "Export a student to ONNX or TensorRT, verified on real images.", "export"
    ),
    "embed": Entry("mvmr.serve.jobs_cli:embed", "Embed many images to Parquet, resumable."),
    "index": Entry("mvmr.serve.jobs_cli:index", "Index embeddings, to find the nearest."),
    "search": Entry("mvmr.serve.jobs_cli:search", "Find the images of an index nearest to one."),
    "serve": Entry("mvmr.serve.cli:serve", "Serve embeddings over HTTP."),
    "app": Entry("mvmr.app.cli:app", "Compare teacher and student in the browser.", "app"),
    "bench": Entry("mvmr.export.cli:bench", "Measure speed on this machine.", "export"),
    "info": Entry("mvmr.cli.commands:info", "Show what a bundle is and how it was made."),
    "doctor": Entry("mvmr.cli.doctor:doctor", "Show what this machine has, and what each command lacks."),
}
