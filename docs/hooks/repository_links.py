"""Links of a page to files of the repository, which the site does not have.

In the repository they are relative paths. On the site they lead to `repo_url`, or, while that is
not known, become plain text. A link to a file that does not exist is a warning, which fails the
build.
"""

import logging
import posixpath
import re
from pathlib import Path

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
ROOT = Path(__file__).parents[2]
log = logging.getLogger("mkdocs.hooks.repository_links")


def resolve(page: str, target: str) -> str | None:
    """Returns the path in the repository of a link that leaves docs/; None if it stays inside.

    Args:
        page: path of the page within docs/.
        target: relative path of the link.
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def replace_links(markdown: str, page: str, repo_url: str | None) -> str:
    """Returns the text of a page with its links out of docs/ replaced."""

    def replace(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        path = resolve(page, target)
        if path is None:
            return match[0]
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page, path)
        if not repo_url:
            return text if text.startswith("`") else f"`{path}`" if text == path else text
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{anchor})"

    return LINK.sub(replace, markdown)


def on_page_markdown(markdown, page, config, files):
    return replace_links(markdown, page.file.src_uri, config.repo_url)
