"""The documents: commands parse, files and names exist, the reference is complete, and (slow) every block runs.

Comments in the Markdown, which readers do not see, direct the tests of the next block:

    <!-- not run: REASON -->        the block is only parsed
    <!-- needs: MODULE -->          it runs only if the module is installed
    <!-- file: PATH -->             a Python block that is saved under this path, then run
    <!-- setup: COMMAND -->         a command that runs before the block

Long commands are shortened by `SHORT`.
"""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import gptjax
from gptjax import cli
from gptjax.commands import RENAMED_OPTIONS
from gptjax.config import RENAMED, Experiment
from gptjax.schema import leaves

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import layers  # noqa: E402
import reference  # noqa: E402
import test_layers  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRANSLATIONS = [("README.md", "README.zh.md"), ("docs/getting-started.md", "docs/getting-started.zh.md")]
RUNNABLE = [page for page in PAGES if ".zh" not in page.name and page.name != "CONTRIBUTING.md"]
SHORT = {  # command -> options that make it short, if the document does not set them
    "train": {
        "--train.steps": "4", "--optim.warmup-steps": "1", "--train.eval-every": "0", "--train.checkpoint-every": "2",
        "--train.sample-tokens": "4",
    },
    "sweep": {"--seeds": "1"},
    "eval": {"--limit": "4"},
    "profile": {"--steps": "2"},
    "replay": {"--step": "5"},
}  # fmt: skip
SHORT_SWEEP = ("train.steps=4", "optim.warmup_steps=1", "train.eval_every=0", "train.checkpoint_every=2")


class Block(NamedTuple):
    """A block of code in a document."""

    page: str
    line: int
    language: str
    text: str
    directives: list[tuple[str, str]]

    def directive(self, name: str) -> list[str]:
        return [value for key, value in self.directives if key == name]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order, each with the comments before it."""
    found: list[Block] = []
    directives: list[tuple[str, str]] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if match := re.fullmatch(r"<!-- ([a-z ]+): (.*) -->", line):
            directives.append((match[1], match[2]))
        elif match := re.fullmatch(r"```(\w*)", line):
            text = []
            for _, inside in lines:
                if inside == "```":
                    break
                text.append(inside)
            found.append(Block(str(page.relative_to(ROOT)), number, match[1], "\n".join(text) + "\n", directives))
            directives = []
    assert not directives, f"{page}: the comment {directives} belongs to no block"
    return found


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL_BLOCKS if block.language == "bash"]
PYTHON = [block for block in ALL_BLOCKS if block.language == "python"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `gptjax` command in a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;|\|", line) if "'" not in line else [line]:
            words = shlex.split(part, comments=True)
            starts = [i for i, word in enumerate(words) if Path(word).name == "gptjax"]
            if starts:
                yield words[starts[0] + 1 :]


class _Stop(Exception):
    """Raised after the options were parsed."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command as `gptjax` does, and stops before it does anything. Raises for an unknown option."""
    command, *arguments = words
    module_name, function = cli.COMMANDS[command]
    module = importlib.import_module(module_name)
    original = module.parse

    def parse_and_stop(*args: object) -> None:
        original(*args)
        raise _Stop

    if command == "train" and not (ROOT / arguments[0]).exists():
        arguments = arguments[1:]  # the file is made by the document: parse the options for the default experiment
    with monkeypatch.context() as patch:
        patch.setattr(module, "parse", parse_and_stop)
        patch.chdir(ROOT)
        with pytest.raises(_Stop):
            getattr(module, function)(arguments)


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_every_command_parses(block, monkeypatch):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    lines = [value for value in block.directive("setup") if value.startswith("gptjax")]
    for words in commands("\n".join([*lines, block.text])):
        assert words[0] in cli.COMMANDS, f"{block.where}: no command {words[0]!r}"
        try:
            parse(words, monkeypatch)
        except SystemExit as e:
            pytest.fail(f"{block.where}: gptjax {shlex.join(words)} does not parse ({e})")


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_every_python_block_imports_names_that_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gptjax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.where}: {node.module} has no {alias.name}"


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name}: {file.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_field_and_option_that_is_named_exists(page):
    fields = leaves(Experiment)
    sections = "|".join({path.split(".")[0] for path in fields if "." in path})
    options = {row.name for command in cli.COMMANDS for row in reference.option_rows(reference.options_of(command))}
    options |= {f"--{path}".replace("_", "-") for path in fields} | {"--help", "--tiny", "--kills"}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"(gptjax|tests|docs|experiments|benchmarks)/[\w./]*", code):
            assert (ROOT / code).exists(), f"{page.name}: {code} does not exist"
        if "(" in code or page.name.startswith("from-"):  # these pages have names of other projects
            continue
        for path in re.findall(rf"^(?:{sections})\.\w+", code):
            assert path in fields, f"{page.name}: there is no field {path}"
        for option in re.findall(r"(?:^|\s)(--[a-z][\w.-]*)", code if code.startswith(("--", "gptjax")) else ""):
            assert option in options or option.startswith("--section"), f"{page.name}: there is no option {option}"


def test_the_changelog_has_every_renamed_field_and_option():
    text = (ROOT / "CHANGELOG.md").read_text()
    for old, new in RENAMED.items():
        assert f"| `{old}` | `{new}` |" in text
    for renamed in RENAMED_OPTIONS.values():
        for old, new in renamed.items():
            assert f"`{old}`" in text and f"`{new}`" in text


def test_the_readme_has_every_command_and_at_most_200_lines():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for command in cli.COMMANDS:
        assert re.search(rf"^\| `gptjax {command}\b", text, re.MULTILINE), f"README.md has no row for gptjax {command}"


@pytest.mark.parametrize(("english", "chinese"), TRANSLATIONS)
def test_both_languages_have_the_same_commands_code_and_figures(english, chinese):
    a, b = ROOT / english, ROOT / chinese

    def content(page: Path) -> list[tuple[str, str, list[tuple[str, str]]]]:
        return [(block.language, block.text, block.directives) for block in blocks(page)]

    def code(page: Path) -> list[str]:
        return sorted(re.findall(r"`[^`\n]+`", prose(page)))

    def figures(page: Path) -> list[str]:
        text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|CPU|int8", "", prose(page))
        return sorted(re.findall(r"\d+(?:[.,]\d+)*(?:e-\d+)?%?", text))

    assert content(a) == content(b)
    assert code(a) == code(b)
    assert figures(a) == figures(b)
    assert len(re.findall(r"^#+ ", prose(a), re.MULTILINE)) == len(re.findall(r"^#+ ", prose(b), re.MULTILINE))


# The reference


def test_the_reference_has_every_field_with_its_comment():
    page = reference.experiment_page()
    for path in leaves(Experiment):
        row = re.search(rf"^\| `{re.escape(path)}` \| `[^\n]+` \| [^\n]* \| (.+) \|$", page, re.MULTILINE)
        assert row and row[1].strip(), f"{path} is not in the reference, or has no comment in config.py"


def test_the_reference_has_every_option_that_the_parsers_know(capsys, monkeypatch):
    page = reference.commands_page()
    for command, (module_name, function) in cli.COMMANDS.items():
        section = page.partition(f"## gptjax {command}\n")[2].partition("\n## ")[0]
        assert section, f"gptjax {command} is not in the reference"
        with pytest.raises(SystemExit):
            getattr(importlib.import_module(module_name), function)(["--help"])
        text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        shown = set(re.findall(r"^[│ ]*(--[a-z][\w.-]*)", text, re.MULTILINE))
        options = set(re.findall(r"^\| `(--[\w.-]+)`", section, re.MULTILINE))
        fields = {f"--{path}".replace("_", "-") for path in leaves(Experiment)} | {"--help"}
        assert not shown - options - fields, f"gptjax {command}: options are missing in the reference"
        assert options or command == "verify", f"gptjax {command}: the reference has no options"


def test_every_option_has_an_explanation():
    rows = [(c, row) for c in cli.COMMANDS for row in reference.option_rows(reference.options_of(c))]
    without = [f"{c} {row.name}" for c, row in rows if not row.comment and row.name != "--experiment"]
    assert not without


def test_the_reference_has_every_public_name():
    page = reference.api_page()
    for name in gptjax.__all__:
        assert name == "__version__" or re.search(rf"^::: gptjax\.[\w.]+\.{name}$", page, re.MULTILINE)


@pytest.mark.slow
def test_the_site_builds_and_has_the_whole_reference(tmp_path):
    pytest.importorskip("mkdocs")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path], cwd=ROOT, check=True
    )
    html = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "reference").glob("*.html")}
    for path in leaves(Experiment):
        assert path in html["experiment"]
    for command in cli.COMMANDS:
        for row in reference.option_rows(reference.options_of(command)):
            assert row.name in html["commands"]
    for name, module in gptjax._MODULE_OF.items():
        assert f'id="{module}.{name}"' in html["api"]
    assert 'class="layers"' in (tmp_path / "architecture.html").read_text(encoding="utf-8")
    assert "https://fonts" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_picture_of_the_layers_has_every_package():
    packages = {path.parent.name for path in (ROOT / "gptjax").glob("*/__init__.py")}
    assert packages <= layers.package_graph().keys()
    picture = layers.svg()
    for name in sorted(packages | {"base"}):
        assert f">{name}</text>" in picture
    levels = {name: number for number, row in enumerate(layers.layers()) for name in row}
    for lower, higher in zip(test_layers.LAYERS, test_layers.LAYERS[1:], strict=False):
        for a in {m.removeprefix("gptjax.") for m in lower} & packages:
            for b in {m.removeprefix("gptjax.") for m in higher} & packages:
                assert levels[a] <= levels[b], f"the picture has {a} above {b}, and tests/test_layers.py below"


# Running the documents

WRAPPER = """#!/bin/sh
exec {python} {test} "$@"
"""


def shortened(words: list[str]) -> list[str]:
    """A command with few steps."""
    command, *arguments = words
    given = {word.partition("=")[0] for word in arguments}
    if command == "sweep":
        at = arguments.index("--set") + 1 if "--set" in arguments else len(arguments)
        rest = arguments[at:]
        while rest and "=" in rest[0] and not rest[0].startswith("--"):
            rest.pop(0)
        arguments = [word for word in arguments[:at] if word != "--set"] + rest + ["--set", *SHORT_SWEEP]
    if command == "train":
        return [command, *shortened_train(arguments)]
    for option, value in SHORT.get(command, {}).items():
        if option == "--limit" and "--tasks" not in given:
            continue
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    return [command, *arguments]


def shortened_train(arguments: list[str]) -> list[str]:
    """Few steps, but as many as the document says relative to each other: 4, or 6 if it names more than 1,000."""
    options = dict(SHORT["train"])
    if "--train.steps" in arguments:
        at = arguments.index("--train.steps")
        if int(arguments[at + 1]) > 1000:
            options["--train.steps"] = "6"
        del arguments[at : at + 2]
    if "sentiment" in " ".join(arguments) or "grpo" in " ".join(arguments) or "reviews" in " ".join(arguments):
        options["--train.sample-tokens"] = "0"
    for option, value in options.items():
        if option not in arguments:
            arguments += [option, value]
    return arguments


def environment(folder: Path) -> dict[str, str]:
    """A cache of its own, the checkout's `gptjax` with short commands, one JAX device."""
    tools = folder / "bin"
    tools.mkdir()
    wrapper = tools / "gptjax"
    wrapper.write_text(WRAPPER.format(python=shlex.quote(sys.executable), test=shlex.quote(__file__)))
    wrapper.chmod(0o755)
    (tools / "pip").write_text("#!/bin/sh\nexit 0\n")  # what is installed is decided by the environment of the tests
    (tools / "pip").chmod(0o755)
    values = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GPTJAX_DATA")}
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), values["PATH"]])
    return values | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", "HF_HUB_OFFLINE": "1"}


def is_installed(block: Block) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in block.directive("needs"))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in RUNNABLE if blocks(p)], ids=lambda page: page.stem)
def test_every_block_runs_in_the_order_of_its_page(page, tmp_path):
    env = environment(tmp_path)
    folder = tmp_path / "checkout"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=ignored)
    for block in blocks(page):
        if block.directive("not run") or not is_installed(block):
            continue
        setup = "\n".join(block.directive("setup"))
        text = block.text
        if block.language == "python":
            for name in block.directive("file"):
                (folder / name).write_text(text)
            (folder / "block.py").write_text(text)
            text = f"{shlex.quote(sys.executable)} block.py"
        elif block.language != "bash":
            continue
        script = f"set -e\ncd {shlex.quote(str(folder))}\n{setup}\n{text}"
        pythonpath = f"{folder}{os.pathsep}{env['PYTHONPATH']}"
        done = subprocess.run(
            ["bash", "-c", script], env=env | {"PYTHONPATH": pythonpath}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block.where}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


if __name__ == "__main__":  # the `gptjax` of the blocks
    sys.argv = ["gptjax", *shortened(sys.argv[1:])]
    cli.main()
