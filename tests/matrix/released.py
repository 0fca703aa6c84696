"""In one environment, with this checkout on the path: verify a package that an earlier release wrote."""

import sys

from measure import report

from hub_tools import verify_package

report({"difference": verify_package(sys.argv[1], trust_remote_code=True).max_logit_difference})
