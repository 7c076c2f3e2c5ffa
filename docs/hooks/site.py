"""What mkdocs is told about this repository: a hook of mkdocs.yml.

- A page that begins with ``<!-- include: PATH -->`` is that file: README, the cards, the recipes, CONTRIBUTING and
  CHANGELOG stay where they are. What follows the line is for readers of the repository, and left out.
- Links are written as they work in the repository. On the site they lead to the page that shows the file; to a file
  outside docs/ that is no page, to a page made of it under ``source/``, or to the repository, if ``repo_url`` is set.
- Lists may follow a paragraph without an empty line, as on GitHub; ``<!-- test: ... -->`` lines are left out.
- Pages of docs/results that the nav does not name are appended to its results.
"""

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_INCLUDE = re.compile(r"\A<!-- include: (\S+) -->\n")
_FENCE = re.compile(r"^( *)(```+|~~~+)[^\n]*\n.*?^\1\2[ ]*$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
#: [text](target), ![text](target "title"), [name]: target
_LINK = re.compile(r"(\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))|^(\[[^\]\n]+\]:[ ]+)(\S+)()$", re.MULTILINE)
_TEST = re.compile(r"^[ ]*<!-- test: .*-->\n", re.MULTILINE)
_LANGUAGES = {".py": "python", ".json": "json", ".sh": "bash", ".md": "markdown", ".toml": "toml", ".yml": "yaml"}


def included(docs: Path) -> dict[str, str]:
    """Repository path of each included file -> the page (a path in docs/) that shows it."""
    found = {}
    for page in sorted(docs.rglob("*.md")):
        if head := _INCLUDE.match(page.read_text(encoding="utf-8")):
            found[head[1]] = page.relative_to(docs).as_posix()
    return found


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """``text`` with everything changed that is neither in a fence nor between backticks."""

    def by(pattern: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
        parts, at = [], 0
        for found in pattern.finditer(text):
            parts += [change(text[at : found.start()]), found[0]]
            at = found.end()
        return "".join([*parts, change(text[at:])])

    return by(_FENCE, text, lambda plain: by(_CODE, plain, change))


def links_of(text: str) -> Iterator[str]:
    """The targets of all links outside code, without those that name another site or a place on the page."""
    found: list[str] = []

    def look(plain: str) -> str:
        found.extend(each[2] or each[5] for each in _LINK.finditer(plain))
        return plain

    outside_code(text, look)
    return (each for each in found if not re.match(r"[a-z]+:|#|/", each))


def resolved(target: str, source: str) -> tuple[str, str]:
    """A link's (path in the repository, anchor with its #), written in the file ``source`` of the repository."""
    path, hash_, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), hash_ + anchor


def place_of(path: str, pages: dict[str, str]) -> str | None:
    """Where a file of the repository is in docs/, as a page or as it is; None: it is not on the site."""
    if path in pages:
        return pages[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def rewritten(text: str, source: str, page: str, pages: dict[str, str], repo_url: str | None = None) -> str:
    """The text of ``source`` (a path in the repository) with its links as they work on ``page`` (a path in docs/)."""

    def link(found: re.Match[str]) -> str:
        before, target, after = (found[1], found[2], found[3]) if found[2] else (found[4], found[5], found[6])
        if re.match(r"[a-z]+:|#|/", target):
            return found[0]
        path, anchor = resolved(target, source)
        place = place_of(path, pages)
        if place is None and repo_url:
            return f"{before}{repo_url.rstrip('/')}/blob/main/{path}{anchor}{after}"
        place = place if place is not None else source_page(path)
        return f"{before}{posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor}{after}"

    return outside_code(text, lambda plain: _LINK.sub(link, plain))


def source_page(path: str) -> str:
    """The page made of a file or folder that is on the site only for its links."""
    return f"source/{path}.md"


def source_text(path: str) -> str:
    """A page that shows a file of the repository, or lists a folder's."""
    where, head = ROOT / path, f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if where.is_dir():
        names = sorted(each.name for each in where.iterdir() if each.is_file())
        return head + "\n".join(f"- [{name}]({where.name}/{name}.md)" for name in names) + "\n"
    return f"{head}`````{_LANGUAGES.get(where.suffix, 'text')}\n{where.read_text(encoding='utf-8')}\n`````\n"


def linked(docs: Path) -> list[str]:
    """Files and folders outside docs/ that pages link to, with the files of the folders. Raises ValueError: a link
    leads to nothing."""
    pages, found = included(docs), dict[str, None]()
    for page in sorted(docs.rglob("*.md")):
        text, source = page_text(page.relative_to(docs).as_posix(), docs)
        for target in links_of(text):
            path, _ = resolved(target, source)
            if place_of(path, pages) is not None:
                continue
            if not (ROOT / path).exists() or path.startswith(".."):
                raise ValueError(f"{source}: the link {target} leads to {path}, which is not there")
            found[path] = None
            if (ROOT / path).is_dir():
                found |= {f"{path}/{each.name}": None for each in (ROOT / path).iterdir() if each.is_file()}
    return sorted(found)


def page_text(page: str, docs: Path) -> tuple[str, str]:
    """(text, the repository's path of the file it is from) of a page of docs/."""
    text = (docs / page).read_text(encoding="utf-8")
    if head := _INCLUDE.match(text):
        return (ROOT / head[1]).read_text(encoding="utf-8"), head[1]
    return text, f"docs/{page}"


def lists_apart(text: str) -> str:
    """With an empty line before each list that follows a paragraph's line."""
    item = r"(?:[-*]|\d+\.) "
    return outside_code(text, lambda plain: re.sub(rf"(?m)^(?!{item}|[ \t#|>])(\S.*\n)(?={item})", r"\1\n", plain))


def on_config(config: Any) -> Any:
    """Put the results pages that the nav does not name at its end, and watch the included files."""
    results = next(each["Results"] for each in config.nav if "Results" in each)
    docs = Path(config.docs_dir)
    named = {value for each in results for value in (each.values() if isinstance(each, dict) else [each])}
    pages = sorted(each.relative_to(docs).as_posix() for each in (docs / "results").rglob("*.md"))
    results += [page for page in pages if page not in named]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of linked files outside docs/."""
    from mkdocs.structure.files import File

    if not config.repo_url:
        for path in linked(Path(config.docs_dir)):
            files.append(File.generated(config, source_page(path), content=source_text(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Included, with links that work here."""
    docs, uri = Path(config.docs_dir), page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    text, source = markdown, f"docs/{uri}"
    if head := _INCLUDE.match(markdown):
        text, source = (ROOT / head[1]).read_text(encoding="utf-8"), head[1]
    text = rewritten(text, source, uri, included(docs), config.repo_url)
    return lists_apart(_TEST.sub("", text))


def on_serve(server: Any, config: Any, builder: Any) -> Any:
    """Build again when an included file changes."""
    for path in included(Path(config.docs_dir)):
        server.watch(os.fspath(ROOT / path))
    return server
