"""What GitHub and pre-commit run: it can be read, it exists, and it may do no more than it must."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import mvmr
from tests.scripts import load_script

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(name: str) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = read(WORKFLOWS / name)["jobs"]
    return content


def steps() -> Iterator[dict[str, Any]]:
    for path in sorted(WORKFLOWS.iterdir()):
        for job in jobs(path.name).values():
            yield from job["steps"]


def hooks() -> dict[str, dict[str, Any]]:
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    return {hook["id"]: hook for hook in local["hooks"]}


def targets() -> dict[str, list[str]]:
    """Target of the Makefile -> the lines that it runs."""
    lines: dict[str, list[str]] = {}
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines():
        if target := re.match(r"([\w./-]+):(?!=)", line):
            lines[target[1]] = []
        elif line.startswith("\t"):
            lines[list(lines)[-1]].append(line.strip().replace("$(BIN)", ".venv/bin"))
    return lines


@pytest.fixture
def check_release() -> ModuleType:
    return load_script(ROOT / ".ci" / "check_release.py")


def test_version_and_changelog_agree(check_release: ModuleType) -> None:
    source = (ROOT / "mvmr" / "__init__.py").read_text(encoding="utf-8")
    assert check_release.version(source) == mvmr.__version__
    version, _ = check_release.newest((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert version == mvmr.__version__


SOURCE = '"""A package."""\n__version__ = "1.2.0"\n'
CHANGES = "# Changelog\n\n## {}\n\n- a change\n\n## 1.1.0 (2026-01-31)\n"


def test_a_release_has_one_version_and_a_date(check_release: ModuleType) -> None:
    check_release.check("v1.2.0", SOURCE, CHANGES.format("1.2.0 (2026-02-28)"))


@pytest.mark.parametrize(
    ("tag", "heading", "says"),
    [
        ("v1.2.1", "1.2.0 (2026-02-28)", "the tag must be v1.2.0"),
        ("1.2.0", "1.2.0 (2026-02-28)", "the tag must be v1.2.0"),
        ("v1.2.0", "1.3.0 (2026-02-28)", r"says 1.2.0, the first heading of CHANGELOG.md 1.3.0"),
        ("v1.2.0", "1.2.0 (unreleased)", "1.2.0 is unreleased: put the date there"),
        ("v1.2.0", "1.2.0", "must read"),
        ("v1.2.0", "1.2.0 (2026-02-30)", "day"),
    ],
)
def test_a_release_that_does_not_agree_is_refused(check_release: ModuleType, tag: str, heading: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_release.check(tag, SOURCE, CHANGES.format(heading))


def test_a_refusal_is_one_line_and_an_exit_code(check_release: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check_release.py", "v0.0.0"])
    with pytest.raises(SystemExit, match=r"error: the tag is v0\.0\.0, mvmr/__init__\.py says .*[^\n]$"):
        check_release.main()


def test_the_commands_of_workflows_and_hooks_exist() -> None:
    commands = [line for step in steps() for line in step.get("run", "").splitlines()]
    commands += [hook["entry"] for hook in hooks().values()]
    assert len(commands) > 5
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert set(arguments) <= set(targets()), command
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), command
        elif program.startswith(".venv/bin/"):
            assert command in targets()["lint"], command
        else:
            assert os.access(ROOT / program, os.X_OK), command


def test_hooks_run_what_make_lint_runs() -> None:
    assert {hook["entry"] for hook in hooks().values()} == {*targets()["lint"][:2], "make lint"}
    for hook in hooks().values():
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False


def test_pushes_and_pull_requests_run_what_continuous_integration_runs() -> None:
    assert set(read(WORKFLOWS / "ci.yml")[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    (job,) = jobs("ci.yml").values()
    assert job["runs-on"] == "ubuntu-latest"
    assert job["timeout-minutes"] == 25
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_a_tag_is_checked_built_tried_and_published() -> None:
    assert read(WORKFLOWS / "release.yml")[True] == {"push": {"tags": ["v*"]}}
    build, publish = jobs("release.yml").values()
    assert [step["run"] for step in build["steps"] if "run" in step] == [
        'python .ci/check_release.py "$GITHUB_REF_NAME"',
        "make dist",
        "make dist-check",
    ]
    (upload,) = (step for step in build["steps"] if "upload-artifact" in step.get("uses", ""))
    download, index = publish["steps"]
    assert publish["needs"] == "build"
    assert download["with"] == {"name": upload["with"]["name"], "path": "dist/"}
    assert index == {"uses": "pypa/gh-action-pypi-publish@release/v1"}  # no password, no token


def test_workflows_may_read_and_only_the_release_may_publish() -> None:
    for path in WORKFLOWS.iterdir():
        assert read(path)["permissions"] == {"contents": "read"}, path.name
        for name, job in jobs(path.name).items():
            rights = {"id-token": "write"} if name == "publish" else None
            assert job.get("permissions") == rights, name
            assert job.get("environment") == ("release" if name == "publish" else None), name
            assert job["timeout-minutes"] <= 25


def test_actions_are_pinned_by_major_version() -> None:
    used = {step["uses"] for step in steps() if "uses" in step}
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action), action


def test_reports_of_bugs_come_with_what_the_doctor_says() -> None:
    forms = {path.stem: read(path) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()}
    assert set(forms) == {"bug", "feature"}
    for form in forms.values():
        assert {"name", "description", "body"} <= set(form)
        for part in form["body"]:
            assert part["type"] in ("markdown", "textarea")
            assert part["attributes"].get("label") or part["attributes"].get("value")
    fields = {part.get("id"): part for part in forms["bug"]["body"]}
    assert "`mvmr doctor`" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"] is True
