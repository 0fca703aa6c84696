"""Build the API reference from the docstrings: what `make docs` runs.

    python docs/reference.py            # writes build/docs, to be opened at build/docs/index.html

Imports pdoc (https://pdoc.dev) and everything that is documented. Any warning of pdoc's is an error.
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import pdoc
import pdoc.render

import gpt2_value
import hub_tools

OUT = Path(__file__).resolve().parent.parent / "build" / "docs"
MODULES = (
    "gpt2_value",
    "modeling_gpt2_value",
    "configuration_gpt2_value",
    "generation_gpt2_value",
    "sampling_gpt2_value",
    "scoring_gpt2_value",
    "decoding_gpt2_value",
    "sampler_audit",
    "!sampler_audit[.]",  # these names are documented as those of `sampler_audit` and `hub_tools`
    "hub_tools",
    "!hub_tools[.](?!errors$)",
)


def build(folder: Path) -> None:
    """Write the reference as HTML; raises UserWarning where pdoc warns."""
    for package in (hub_tools, gpt2_value):
        for name in package.__all__:  # pdoc reads `vars(module)`, where names imported at first use are missing
            vars(package)[name] = getattr(package, name)
    pdoc.render.configure(docformat="google", footer_text=f"gpt2-value {hub_tools.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    build(OUT)
    print(OUT / "index.html")
