"""What mkdocs calls: pages that are made of the program and of files elsewhere, and links to them."""

import re

from generated import PAGES
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Files of the repository that are a page of the site under another name.
PLACES = {
    "../benchmarks/RESULTS.md": "ledger.md",
    "../configs/README.md": "recipes.md",
    "../configs/accelerate/README.md": "launch_files.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, write in PAGES.items():
        files.append(File.generated(config, name, content=write()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"\]\((\.\./[^)#]+)", lambda link: f"]({PLACES.get(link[1], link[1])}", markdown)
