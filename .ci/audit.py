"""Judge what pip-audit says of the lock: `pip-audit ... --format json | python .ci/audit.py`.

A package that the database was not asked about is not a package without weaknesses: without a network nothing is
audited, and that is said.
"""

from __future__ import annotations

import json
import sys


def judge(text: str) -> tuple[int, list[str]]:
    """Exit status and lines for a report of pip-audit.

    Args:
        text: its JSON; anything else is what it died of.

    Returns:
        0 when every package was looked up and none has a known weakness, 1 when one has, 2 when some were not found.
    """
    try:
        packages = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return 2, ["not audited: the database of weaknesses could not be asked (is there a network?)"]
    weak = [one for one in packages if one.get("vulns")]
    unknown = [one["name"] for one in packages if "skip_reason" in one]
    lines = [
        f"{one['name']} {one['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none yet'}"
        for one in weak
        for found in one["vulns"]
    ]
    looked_up = len(packages) - len(unknown)
    lines.append(f"{looked_up} of {len(packages)} packages looked up, {len(weak)} with known weaknesses")
    if unknown:
        named = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        lines.append(f"not audited, the database did not answer for them (is there a network?): {named}")
    return 1 if weak else 2 if unknown or not packages else 0, lines


if __name__ == "__main__":
    status, told = judge(sys.stdin.read())
    print("\n".join(told))
    sys.exit(status)
