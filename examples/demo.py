"""From a GPT-2 checkpoint to a value-head package that a stranger loads: what `make demo` runs.

Imports hub_tools, typer, rich and the other examples. Each step says what it does and how long it took. Without
`--base` nothing is downloaded: a small GPT-2 is trained first.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a checkout works without being installed

import typer
from answer_prompts import __file__ as STRANGER
from fit_value_head import fit_value_head, own_reviews, written_reviews
from picture import Token, draw_responses
from rich.console import Console
from rich.columns import Columns
from rich.table import Table
from rich.text import Text
from train_small_gpt2 import small_gpt2
from transformers import AutoTokenizer
from transformers.utils import logging

from hub_tools import cli, layout, save_package, verify_package
from hub_tools.card import is_hub_id
from hub_tools.errors import GPT2ValueHubError, LoadError
from modeling_gpt2_value import GPT2ValueModel
