"""Prepares a checkout for a release: `python .github/release.py OWNER/NAME TAG`.

The tag must be the version, with its section in CHANGELOG.md. The package index shows the README
without the repository around it, so its links become absolute, those of the tag; [project.urls] are
those of the repository that the release runs in, which no file of the source has to know.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

HOST = "https://github.com"
RAW = "https://raw.githubusercontent.com"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!\w+:|#)([^)\s]+)\)")


def read_version(root: Path) -> str:
    """`__version__` of the package, which is not imported: torch need not be there."""
    for node in ast.parse((root / "grpo_fused" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("grpo_fused/__init__.py must set __version__")


def section(changelog: str, version: str) -> str:
    """The body of a version's section.

    Raises:
        ValueError: there is none, it has no date, or it is empty.
    """
    parts = re.split(r"^## (.*)\n", changelog, flags=re.M)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        if not heading.startswith(f"[{version}]"):
            continue
        if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading):
            raise ValueError(f"CHANGELOG.md must have a date: [{version}] - YYYY-MM-DD: {heading}")
        if not body.strip():
            raise ValueError(f"CHANGELOG.md must say what is in {version}")
        return body.strip()
    raise ValueError(f"CHANGELOG.md must have a section [{version}]")


def absolute_links(text: str, repository: str, tag: str) -> str:
    """A README with links that lead into the repository, and images from it."""

    def absolute(found):
        mark, label, target = found.groups()
        base = f"{RAW}/{repository}/{tag}" if mark else f"{HOST}/{repository}/blob/{tag}"
        label = LINK.sub(absolute, label)  # a badge: an image within a link
        return f"{mark}[{label}]({base}/{target})"

    return LINK.sub(absolute, text)


def with_urls(pyproject: str, repository: str) -> str:
    """A pyproject.toml that has the addresses of a repository.

    Raises:
        ValueError: it has some.
    """
    if re.search(r"^\[project\.urls\]", pyproject, re.M):
        raise ValueError("pyproject.toml must leave [project.urls] to the release, but has them")
    base = f"{HOST}/{repository}"
    owner, _, name = repository.partition("/")
    urls = {
        "Documentation": f"https://{owner.lower()}.github.io/{name}/",
        "Source": base,
        "Issues": f"{base}/issues",
        "Changelog": f"{base}/blob/main/CHANGELOG.md",
    }
    table = "\n".join(f'{key} = "{value}"' for key, value in urls.items())
    return f"{pyproject.rstrip()}\n\n[project.urls]\n{table}\n"


def prepare(root: Path, repository: str, tag: str) -> str:
    """Rewrites README.md and pyproject.toml of a checkout; returns the notes of the release."""
    version = read_version(root)
    if tag != f"v{version}":
        raise ValueError(f"tag must be v{version}, the version of the package, got {tag}")
    notes = section((root / "CHANGELOG.md").read_text(), version)
    readme = absolute_links((root / "README.md").read_text(), repository, tag)
    pyproject = with_urls((root / "pyproject.toml").read_text(), repository)
    (root / "README.md").write_text(readme)
    (root / "pyproject.toml").write_text(pyproject)
    return notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument("tag", help="vVERSION")
    parser.add_argument("--notes", type=Path, help="file for the section of CHANGELOG.md")
    given = parser.parse_args()
    try:
        notes = prepare(Path(__file__).parents[1], given.repository, given.tag)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if given.notes:
        given.notes.write_text(notes + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
