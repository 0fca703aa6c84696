"""Add this version's code to the list of releases (`make release-hashes`). What was released once stays as it is."""

import json

from hub_tools import layout
from hub_tools.package.record import RELEASES

recorded = json.loads(RELEASES.read_text(encoding="utf-8"))
recorded.setdefault(layout.__version__, layout.installed_hashes())
RELEASES.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
