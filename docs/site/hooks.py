"""The site's pages that do not lie in docs/: README.md, DATA.md and the notebook, with links that hold there, too.

Every relative link of a page is looked up in the clone. One to a page leads to that page; one to any other file takes a
copy of it into the site. What is not there stays as it is, and the strict build names it.
"""

import base64
import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "examples/rule_on_your_network.ipynb"
PAGES = {"README.md": "index.md", "DATA.md": "data.md", NOTEBOOK: "notebook.md"}
FOLDERS = {page: posixpath.dirname(source) for source, page in PAGES.items()}  # of the sources; of others: docs
LINK = re.compile(r'(?<=\]\()[^)\s]+(?=\))|(?<=(?:src|ref)=")[^"]+(?=")')
CODE = re.compile(r"`[^`\n]+`")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        if source == NOTEBOOK:
            text, pictures = read_notebook(ROOT / source)
            for name, content in pictures.items():
                files.append(File.generated(config, name, content=content))
        else:
            text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    return files


def read_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs -> Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append("```text\n" + "".join(output["text"]).strip("\n") + "\n```")
            elif "image/png" in output["data"]:
                name = f"notebook-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![The picture that this cell draws]({name})")
    return "\n\n".join(parts) + "\n", pictures


def unescape(code: re.Match[str]) -> str:
    r"""`a\|b`, which a table needs elsewhere, without the backslash, which would be shown here."""
    return code[0].replace(r"\|", "|")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = FOLDERS.get(page.file.src_uri, "docs")

    def relink(match: re.Match[str]) -> str:
        target, mark, anchor = match[0].partition("#")
        path = posixpath.normpath(posixpath.join(folder, target))
        if not target or ":" in target or not (ROOT / path).is_file():
            return match[0]
        inside = PAGES.get(path) or path.removeprefix("docs/")
        if inside == path and files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return inside + mark + anchor

    pieces = FENCE.split(markdown)  # code stays as it is
    pieces[::2] = [CODE.sub(unescape, LINK.sub(relink, piece)) for piece in pieces[::2]]
    return "".join(pieces)
