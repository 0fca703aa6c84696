"""The public names and their arguments, frozen: what is written here is what other people's code calls.

Adding an argument with a default is a line here; taking one away, or renaming it, breaks code.
"""

import inspect

import pytest

import hub_tools

# name -> its arguments, as Python writes them, without annotations
FACE = {
    "save_package": "(model, folder, tokenizer=None, *, overwrite=True, base_model=None, license=None, tags=(), "
    "repo_id=None, max_shard_size='5GB')",
    "inspect_package": "(source, *, revision=None, hash_weights=False, token=None, cache_dir=None, "
    "local_files_only=False)",
    "verify_package": "(source, *, revision=None, trust_remote_code=False, timeout=600.0, token=None)",
    "load_package": "(source, *, revision=None, reviewed_sha256=None, dtype=None, token=None, cache_dir=None, "
    "local_files_only=False)",
    "push_package": "(folder, repo_id, *, revision=None, private=None, create_pr=False, tag=None, "
    "commit_message='Push a value-head package', token=None, dry_run=False, trust_remote_code=False)",
    "push_to_hub": "(model, repo_id, tokenizer=None, *, base_model=None, license=None, tags=(), max_shard_size='5GB', "
    "revision=None, private=None, create_pr=False, tag=None, commit_message='Push a value-head package', "
    "token=None, dry_run=False)",
    "convert_checkpoint": "(source, folder, *, revision=None, config=None, source_format=None, base=None, "
    "tokenizer=None, summary_first_dropout=None, init_value_head=False, dtype=None, overwrite=True, base_model=None, "
    "license=None)",
    "export_policy": "(model, folder, *, revision=None, tokenizer=None, overwrite=False)",
    "export_critic": "(model, folder, *, head='token-classification', revision=None, tokenizer=None, overwrite=False)",
    "CheckpointPusher": "(repo_id, *, revision=None, private=None, token=None, metric_for_best_model=None, "
    "greater_is_better=None, best_tag='best', dataset='the training run', base_model=None, license=None, "
    "tags=(), max_shard_size='5GB')",
    "CheckpointPusherCallback": "(pusher)",
    "GPT2ValueHubError": "(found, *, expected='', next_step)",
}
RECORDS = {"Conversion", "LoadedPackage", "PackageReport", "PushReport", "PushedCheckpoint", "SavedPackage"}


def arguments(function):
    signature = inspect.signature(function)
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


@pytest.mark.parametrize("name", FACE)
def test_the_public_functions_take_what_they_took(name):
    assert arguments(getattr(hub_tools, name)) == FACE[name]


def test_no_public_name_is_lost():
    records = {*RECORDS, "VerificationReport"}
    assert {*FACE, *records, "__version__"} <= set(hub_tools.__all__) <= set(dir(hub_tools))
    assert all(getattr(hub_tools, name) is not None for name in hub_tools.__all__)
