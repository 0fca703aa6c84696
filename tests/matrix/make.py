"""In one environment, with this checkout on the path: make a package, and verify it and those of earlier releases.

    python make.py FOLDER RELEASED...    # JSON: the numbers, and what verify_package found: a difference, or why not

Code of a release that cannot run on this transformers is an error that says so.
"""

import json
import sys
from pathlib import Path

import torch
from measure import measurements
from transformers import __version__

from configuration_gpt2_value import GPT2ValueConfig
from hub_tools import save_package, verify_package
from hub_tools.errors import LoadError
from modeling_gpt2_value import GPT2ValueModel

folder, *released = map(Path, sys.argv[1:])
torch.manual_seed(sum(map(ord, __version__)))
shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 64, "bos_token_id": 0}
head = {"value_head_initializer_range": 0.2, "summary_activation": "tanh", "detach_value_head": True}
model = GPT2ValueModel(GPT2ValueConfig(**shape, **head, eos_token_id=0)).eval()
with torch.no_grad():
    for weight in model.transformer.parameters():
        weight.mul_(3)  # logits that differ from token to token
save_package(model, folder)
found = {}
for package in (folder, *released):
    try:
        found[package.name] = verify_package(package, trust_remote_code=True).max_logit_difference
    except LoadError as error:
        found[package.name] = str(error)
print(json.dumps({"made": measurements(model), "verified": found}))
