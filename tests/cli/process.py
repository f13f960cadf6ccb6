"""The command in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from common.reporting.papers import project_root


def assemble(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; `code` runs after it, in the same process."""
    program = f"import sys; from common.commands.main import main; sys.argv = ['assemble', *{list(arguments)!r}]\n"
    program += f"try:\n    status = main()\nexcept SystemExit as end:\n    status = end.code\n{code}\nsys.exit(status)"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=project_root(), timeout=120, check=False
    )


LOADED = "print('LOADED', [n for n in ('torch', 'lightning') if n in sys.modules])"
