"""In one environment, with this checkout on the path: verify packages that earlier releases wrote, by their own code.

    python released.py PACKAGE...    # JSON: name of the package -> largest difference of a number, or why not

Code of a release that cannot run on this transformers is an error that says so.
"""

import json
import sys
from pathlib import Path

from hub_tools import verify_package
from hub_tools.errors import LoadError

found = {}
for package in map(Path, sys.argv[1:]):
    try:
        found[package.name] = verify_package(package, trust_remote_code=True).max_logit_difference
    except LoadError as error:
        found[package.name] = str(error)
print(json.dumps(found))
