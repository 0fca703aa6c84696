"""Pushes of packages that need no proof: verifying takes an interpreter's start."""

from unittest import mock

from hub_tools.publish import push

REPO = "alice/value"


def push_verified(folder, repo_id=REPO, **options):
    """`push_package` for a package that needs no further proof."""
    with mock.patch.object(push, "verify_package"):
        return push.push_package(folder, repo_id, **{"commit_message": "push", **options})
