"""What mkdocs has to be told about files outside docs/.

README, CONTRIBUTING and CHANGELOG become pages. Any other file of the repository that a page links to (measurements as JSON,
scripts, sources) is copied into the site under repository/, so that every link works without knowing where the repository is
hosted. A link to a file that does not exist ends the build.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIES = "repository"
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and copies that lie outside docs/."""
    docs = Path(config.docs_dir)
    texts = {docs / page.src_uri: page.content_string for page in files.documentation_pages()}
    for name, uri in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        texts[ROOT / name] = text
        files.append(File.generated(config, uri, content=_linked(text, ROOT)))
    for path, text in texts.items():
        for target in _outside(text, path.parent, docs):
            uri = f"{COPIES}/{target.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links out of docs/ to the pages and copies."""
    return markdown if page.file.generated_by else _linked(markdown, Path(config.docs_dir))


def _outside(text: str, folder: Path, docs: Path) -> list[Path]:
    """The files that a text links to, neither in docs/ nor pages."""
    targets = {(folder / link).resolve() for _, link in LINK.findall(text)}
    outside = [target for target in targets if not target.is_relative_to(docs) and target.name not in PAGES]
    for target in outside:
        if not target.is_file():
            raise PluginError(f"a page links to {target.relative_to(ROOT)}, which is not a file of the repository")
    return sorted(outside)


def _linked(text: str, folder: Path) -> str:
    """The text with its links as seen from docs/."""

    def link(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return found[1] + target.relative_to(ROOT / "docs").as_posix()
        inside = target.relative_to(ROOT).as_posix()
        return found[1] + PAGES.get(inside, f"{COPIES}/{inside}")

    return LINK.sub(link, text)
