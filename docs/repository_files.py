"""A hook of mkdocs: pages and files that lie beside docs/ and belong to the site all the same.

Links in the Markdown files are written for the repository, relative to the file they stand in, so
that they work wherever the repository is browsed. In the site docs/ is the root. This hook adds
the files of BESIDE and turns every link into the repository into one of the site; `mkdocs build
--strict` then fails at a link to a file that is not there.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
BESIDE = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
    *("recipes/*", "benchmarks/results/*", "kepo/presets/*", "examples/*", "examples/*/*"),
    *("experiments/*.md", "experiments/*.png"),
)
LINK = re.compile(r"(?<=\]\()(?!#|[a-z]+:)([^)#\s]+)")  # [text](path), [text](path#place)


def on_files(files, config):
    """Add the files of BESIDE under their paths in the repository."""
    for pattern in BESIDE:
        for path in sorted(filter(Path.is_file, ROOT.glob(pattern))):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between files of the site."""
    uri = page.file.src_uri
    home = Path(page.file.abs_src_path).parent.relative_to(ROOT).as_posix()

    def in_site(match):
        target = posixpath.normpath(posixpath.join(home, match[1]))
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(uri) or ".")

    return LINK.sub(in_site, markdown)
