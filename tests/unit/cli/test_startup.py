"""The command's help comes at once."""

import subprocess
import sys


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, pipeline.cli\n"
        "with contextlib.suppress(SystemExit): pipeline.cli.main()\n"
        "heavy = {'ray', 'torch', 'mlflow', 'deepspeed', 'transformers', 'pyarrow', 'pandas'}\n"
        "print('heavy:', heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage:" in done.stdout
    assert "heavy: set()" in done.stdout
