"""README, the cards and the site: code blocks run, links lead somewhere, messages and settings are the library's.
What is asked of a block, and how a page says so: `tests/documents.py`."""

import importlib
import pkgutil
import re
import subprocess
import sys

import pytest

from tests import documents, wheel
from tests.harness import ROOT

PAGES = documents.pages()
#: pages of evidence hold commands that take hours: they are checked, not run
RUN = [page for page in PAGES if not page.startswith(("docs/results/", "tests/")) and page != "README.md"]
SITE, REFERENCE = documents.hook("site"), documents.hook("reference")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel as pip installs it."""
    folder = tmp_path_factory.mktemp("installed")
    return wheel.install(wheel.build(folder, "wheel"), folder / "site")


@pytest.fixture(scope="module")
def flags():
    return REFERENCE.flags()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_what_it_says(page, flags):
    """Python compiles, JSON is accepted, commands, flags, extras and files are there; where nothing is run, too."""
    blocks = documents.blocks_of(page)
    assert blocks
    for block in blocks:
        documents.check(block, flags, documents.extras())


def test_readme_runs_from_the_wheel(tmp_path, installed):
    """Outside the repository; quickstart's own run has its own test."""
    assert documents.Page("README.md", tmp_path, installed).run() >= 2


def test_a_megatron_core_model_runs_as_the_tutorial_has_it(tmp_path, installed):
    """On a CPU, from the wheel. A compile of DeepSpeed's kernel that was killed left its lock: nothing is compiled."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"  # torch waits for it
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert documents.Page("docs/tutorials/deepspeed.md", tmp_path, installed, {"megatron_core"}).run() == 1
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_from_the_wheel(tmp_path, installed, page):
    documents.Page(page, tmp_path, installed).run()


@pytest.mark.slow
def test_the_site_builds_strict(tmp_path):
    """Where mkdocs is installed: no broken link or anchor, and nothing that a browser would fetch from elsewhere."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) > 30
    fetched = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]+"')
    assert not [hit for path in built for hit in fetched.findall(path.read_text("utf-8"))]


# --- a page that is wrong is found ---

WRONG = {
    "python that does not compile": "```python\nfor:\n```",
    "an unknown setting": '```json\n{"weight_averaging": {"enabled": true, "intervall": 5}}\n```',
    "a wrong optimizer": '```json\n{"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}\n```',
    "JSON that does not parse": '```json\n{"weight_averaging": }\n```',
    "a command that is not there": "```bash\nds-plugin mrege a b --out c\n```",
    "a flag that is not there": "```bash\nds-plugin plan --config a.json --world-sizes 8\n```",
    "a flag of run": "```bash\ntorchrun --nproc-per-node 8 -m ds_plugin run --configs a.json train.py\n```",
    "a flag of the script": "```bash\nbash launch_scripts/quickstart.sh --step 5\n```",
    "a flag of Megatron's": "```bash\ntorchrun -m megatron_patches pretrain_gpt.py --ds-plugin-conf a.json\n```",
    "a file that is not there": "```bash\ncat configs/quickstarts.json\n```",
    "an extra that is not there": '```bash\npip install ".[deepspeed,torch]"\n```',
    "bash that does not parse": "```bash\nif true; then echo\n```",
    "a diff of neither": "```diff\n-a = 1\n+a = (\n```",
    "a fixture that is not there": "<!-- test: nobody -->\n```python\npass\n```",
    "a language that nobody runs": "```pyton\npass\n```",
    "a skip without a reason": "<!-- test: skip -->\n```python\npass\n```",
    "a mark without a block": "<!-- test: files -->\n\n```python\npass\n```",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_block_is_found(what, flags):
    with pytest.raises((AssertionError, SyntaxError, ValueError)):
        for block in documents.blocks_of("page.md", f"Text.\n\n{WRONG[what]}\n"):
            documents.check(block, flags, documents.extras())


@pytest.mark.parametrize("language", ["python", "bash"])
def test_a_block_that_fails_turns_its_page_red(tmp_path, monkeypatch, language):
    text = "```python\nraise SystemExit(3)\n```\n" if language == "python" else "```bash\nfalse | true\necho\n```\n"
    block = documents.blocks_of("page.md", text)[0]
    monkeypatch.setattr(documents, "blocks_of", lambda page, text=None: [block])
    with pytest.raises(AssertionError, match=r"page.md:1: exit code"):
        documents.Page("page.md", tmp_path, ROOT).run()


# --- the reference is the library's ---


@pytest.mark.parametrize("page", REFERENCE.PAGES)
def test_the_reference_is_the_library_of_today(page):
    assert (ROOT / page).read_text("utf-8") == REFERENCE.PAGES[page](), "python docs/hooks/reference.py writes it"


BRIDGE = {"megatron_patches.bridge.attach", "megatron_patches.bridge.Plugin"}  # importing it needs Megatron-Bridge


def test_the_reference_has_every_exported_name():
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference" / "api.md").read_text(), re.MULTILINE))
    packages = (
        "ds_plugin",
        "ds_plugin.huggingface",
        "ds_plugin.completep",
        "megatron_patches",
        "megatron_patches.completep",
    )
    exported = {f"{name}.{each}" for name in packages for each in importlib.import_module(name).__all__}
    assert exported <= named
    assert not [name for name in named - BRIDGE if not callable(pkgutil.resolve_name(name))]


# --- troubleshooting ---

TROUBLE = ROOT / "docs" / "troubleshooting.md"


def quoted():
    """The messages that the page has an answer to: its headings, … for what is filled in."""
    return re.findall(r"^### `+ ?(.+?) ?`+$", TROUBLE.read_text("utf-8"), re.MULTILINE)


def unknown(messages, literals):
    """(message, part) of each part that no text of the library holds."""
    return [
        (message, part.strip())
        for message in messages
        for part in message.split("…")
        if part.strip() and not any(part.strip() in text for text in literals)
    ]


def test_every_quoted_message_is_the_librarys():
    messages, literals = quoted(), [re.sub(r"\s+", " ", text) for text in documents.literals()]
    assert len(messages) >= 20 and len(set(messages)) == len(messages)
    assert unknown(messages, literals) == []
    assert all(max(map(len, message.split("…"))) >= 15 for message in messages)  # something to search for
    assert unknown(["was saved by somebody else"], literals)


# --- links ---


def test_links_lead_to_files_of_the_repository():
    """Those of every page, README's and the cards' too, as they work in the repository."""
    broken = []
    for page in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.splitlines():
        for target in SITE.links_of((ROOT / page).read_text("utf-8")) if (ROOT / page).is_file() else ():
            path, _ = SITE.resolved(target, page)
            if path.startswith("..") or not (ROOT / path).exists():
                broken.append(f"{page}: {target}")
    assert broken == []


def test_links_of_a_card_are_rewritten_for_the_page_that_shows_it():
    pages = {"ds_plugin/huggingface/README.md": "methods/huggingface.md", "README.md": "index.md"}
    text = (
        "[a](../../docs/megatron.md#limits) [b](../huggingface/README.md) ![c](../../docs/results/x.png)\n"
        "`[d](../e.md)` [f](https://example.org) [g](#here) [h](../../launch_scripts/examples)\n\n"
        "```python\n[i](../e.md)\n```\n\n[j]: ../../README.md\n"
    )
    said = SITE.rewritten(text, "ds_plugin/weight_averaging/README.md", "methods/weight_averaging.md", pages)
    assert said == (
        "[a](../megatron.md#limits) [b](huggingface.md) ![c](../results/x.png)\n"
        "`[d](../e.md)` [f](https://example.org) [g](#here) [h](../source/launch_scripts/examples.md)\n\n"
        "```python\n[i](../e.md)\n```\n\n[j]: ../index.md\n"
    )
    url = SITE.rewritten("[h](../../a.py#L3)", "ds_plugin/x/README.md", "methods/x.md", pages, "https://example.org/r/")
    assert url == "[h](https://example.org/r/blob/main/a.py#L3)"


def test_the_site_has_a_place_for_every_page():
    """The nav names every page of docs/ once, results aside, which the hook appends, and no page that is not there."""
    named = re.findall(r"^ +- ([\w/.]+\.md)\b", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    docs = ROOT / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert len(set(named)) == len(named) and set(named) <= there
    assert {page for page in there if not page.startswith("results/")} <= set(named)
