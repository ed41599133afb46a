"""Stands in for `invoke grade`: does what a submission's first line says, without a machine.

    python3 fake_grade.py SOLVED_RESULT CALLS SUBMISSION RESULT

The line is ``// grade: WORD``. The words: ``full``; ``half``, every other check wrong; ``nothing``;
``infra``; ``infra-once``, then full; ``crash``; ``error``, as a user's error; ``torn``, a result
that is none; ``wait``, until CALLS with the suffix .go is there. Each call is a line in CALLS.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    solved, calls, submission, result = map(Path, sys.argv[1:])
    word = (submission / "mp_batch.c").read_text().split("\n")[0].removeprefix("// grade: ")
    before = calls.read_text().split("\n") if calls.exists() else []
    with calls.open("a") as file:
        file.write(f"{word} {os.getpid()}\n")
    again = any(line.startswith(f"{word} ") for line in before)
    document = json.loads(solved.read_text())
    checks = document["checks"]
    match word:
        case "crash":
            os.abort()
        case "error":
            print("error: the solution does not boot here\nwhat to do: run `invoke doctor`")
            return 1
        case "torn":
            result.write_text('{"version": 1')
            return 0
        case "wait":
            # Not for ever: a test that fails leaves it behind.
            end = time.monotonic() + 60
            while not calls.with_suffix(".go").exists() and time.monotonic() < end:
                time.sleep(0.02)
        case "infra" | "infra-once" if not (again and word == "infra-once"):
            checks[0].update(verdict="infra", points=0, reason="the solution fails here, too")
        case "half" | "nothing":
            for check in checks[:: 2 if word == "half" else 1]:
                check.update(verdict="fail", points=0)
    document["score"] = sum(check["points"] for check in checks)
    result.write_text(json.dumps(document))
    return 3 if word.startswith("infra") else 0


if __name__ == "__main__":
    sys.exit(main())
