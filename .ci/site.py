"""Brings what lies outside of `notebooks/` into the site, and links to it."""

import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

_ROOT = Path(__file__).parents[1]
_MOVED = {"CHANGELOG.md": "changes.md", ".github/SECURITY.md": "security.md"}
# As they stand in the repository, and on the site.
_LINKS = {f"](../{old})": f"]({new})" for old, new in _MOVED.items()} | {
    "](../experiments/": "](experiments/"
}
_LINKS_OF_EXPERIMENTS = {
    "](../notebooks/": "](../",
    "](../README.md)": "](../index.md)",
}
# Material shows its navigation from 1220 pixels on; here from 960.
_WIDTHS = {"76.25em": "60em", "76.234375em": "59.984375em"}
# What stands where a figure of a notebook is not described.
_NO_ALT = 'alt="No description has been provided for this image"'


def on_files(files: Any, config: Any) -> Any:
    """Adds pages, and the pictures and the code that they refer to."""
    folder = _ROOT / "experiments"
    paths = [folder / "README.md", folder / "common" / "solvers.py"]
    paths += sorted((folder / "results").rglob("*.png"))
    names = {str(path.relative_to(_ROOT)): path for path in paths}
    names |= {new: _ROOT / old for old, new in _MOVED.items()}
    for name, path in names.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages."""
    of_experiments = page.file.src_uri.startswith("experiments/")
    for old, new in (_LINKS_OF_EXPERIMENTS if of_experiments else _LINKS).items():
        markdown = markdown.replace(old, new)
    return markdown


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Describes figures of a notebook by the `alt` of their cells, and mends links."""
    path = Path(page.file.abs_src_path)
    if path.suffix != ".ipynb":
        return content
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = html.escape(cell["metadata"]["alt"])
                content = content.replace(_NO_ALT, f'alt="{alt}"', 1)
    return re.sub(r'href="([\w-]+)\.md', r'href="../\1/', content)


def on_post_build(config: Any) -> None:
    """Shows the navigation on narrower screens; the theme has no setting for it."""
    assets = Path(config.site_dir) / "assets"
    for name in ("stylesheets/main", "stylesheets/palette", "javascripts/bundle"):
        (path,) = assets.glob(f"{name}.*s")
        text = path.read_text()
        if "76.25em" not in text:
            msg = f"{path.name} has no width of 76.25em any more: see `_WIDTHS`."
            raise PluginError(msg)
        for old, new in _WIDTHS.items():
            text = text.replace(old, new)
        path.write_text(text)
