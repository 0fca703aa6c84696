"""Pushes of packages that need no proof: verifying takes an interpreter's start."""

from hub_tools.hub.repository import Hub
from hub_tools.publish.push import Package, PushOptions, push

REPO = "alice/value"


def push_verified(folder, repo_id=REPO, *, token=None, **options):
    """`push_package` for a package that needs no further proof (verifying takes an interpreter's start)."""
    hub = Hub(repo_id, token=token)
    hub.check_token()
    package = Package.read(folder)
    package.refuse_secrets(hub, "push")
    return push(package, hub, PushOptions(**{"message": "push", **options}))


def verified_before(folder, *, trust_remote_code=False):
    """In place of `verify_package` where a test has seen it already: it takes an interpreter's start."""
