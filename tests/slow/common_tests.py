"""transformers' own common tests on GPT2ValueModel: `make common-tests`.

    python tests/slow/common_tests.py [FOLDER]    # the sdist is fetched into FOLDER, by default runs/common-tests

They are in transformers' sdist, of the version that is installed. The same tests run on GPT2LMHeadModel, and what does
not fail there must not fail here, but for what is so by design. Exit status 1 where something else fails.
"""

import subprocess
import sys
import tarfile
import unittest
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_HEAD, NO_GRADIENT = (
    "a package without its head is an error",
    "no gradient of a language-model loss for the head",
)
BY_DESIGN = {
    "test_correct_missing_keys": WITHOUT_HEAD,
    "test_model_weights_reload_no_missing_tied_weights": WITHOUT_HEAD,
    "test_training_gradient_checkpointing": NO_GRADIENT,
    "test_training_gradient_checkpointing_use_reentrant_false": NO_GRADIENT,
    "test_training_gradient_checkpointing_use_reentrant_true": NO_GRADIENT,
}
# Parts of transformers' repository that the sdist leaves out, and that its common tests import.
LEFT_OUT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def fetched(folder):
    """transformers' `tests`, as the package `transformers_tests` in this folder; returns the folder."""
    version, tests = transformers.__version__, folder / transformers.__version__ / "transformers_tests"
    if not (tests / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*pip, f"transformers=={version}", "--dest", folder], check=True)
        with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        tests.parent.mkdir(exist_ok=True)
        (folder / f"transformers-{version}" / "tests").rename(tests)
        for name, mixin in LEFT_OUT.items():
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text(f"class {mixin}:\n    pass\n")
            (tests / name).with_name("__init__.py").touch()
        (tests / "__init__.py").touch()
    return tests.parent


class Tester:
    """What transformers' tests ask of a model: a small config, and inputs for it."""

    batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads, is_training = 5, 7, 2, 32, 4, True

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        names = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99, "n_positions": 64}
        return self.config_class(**names, bos_token_id=98, eos_token_id=98, pad_token_id=98)

    def prepare_config_and_inputs_for_common(self):
        import torch

        tokens = torch.randint(1, 90, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def cases_of(model_class, mixin):
    class Common(mixin, unittest.TestCase):
        all_model_classes = (model_class,)

        def setUp(self):
            self.model_tester = Tester(model_class.config_class)

    return unittest.defaultTestLoader.loadTestsFromTestCase(Common)


class Outcomes(unittest.TestResult):
    """`passed`, and the errors of what failed; names of tests."""

    def __init__(self):
        super().__init__()
        self.passed, self.failed = set(), {}

    def addSuccess(self, test):
        self.passed.add(test._testMethodName)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addFailure(test, err)

    def addFailure(self, test, err):
        self.failed[test._testMethodName] = f"{err[0].__name__}: {err[1]}"

    addError = addFailure


def main():
    folder = Path(*sys.argv[1:2] or [ROOT / "runs" / "common-tests"]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(fetched(folder)), str(ROOT)]
    from transformers_tests.test_modeling_common import ModelTesterMixin

    from modeling_gpt2_value import GPT2ValueModel

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes = {}
    for model_class in (transformers.GPT2LMHeadModel, GPT2ValueModel):
        outcomes[model_class.__name__] = found = Outcomes()
        cases_of(model_class, ModelTesterMixin).run(found)
        print(f"{model_class.__name__}: {len(found.passed - found.failed.keys())} pass, {len(found.failed)} fail")
    plain, ours = outcomes.values()
    wrong = {name: why for name, why in ours.failed.items() if name not in plain.failed}
    for name, why in wrong.items():
        print(f"{name} ({BY_DESIGN.get(name, 'WRONG')})\n    {why[:600]}")
    print(f"transformers {transformers.__version__}: {len(wrong)} fail here and not there")
    sys.exit(bool(wrong.keys() - BY_DESIGN.keys()))


if __name__ == "__main__":
    main()
