#!/usr/bin/env bash
# Runs the gate and its report. action.yml passes its inputs as GATE_* variables.
#
# Exits as the gate does: 0 holds, 1 regressed, 2 bad input, 3 could not run or could not decide.
# GATE_INCONCLUSIVE=warn turns a 3 into 0, but only where the report says that every benchmark was
# measured and the answer stays open. A 0 without a report that says so too becomes 3.
set -euo pipefail

fail() {  # exit code, message; what the message holds comes from nowhere but this file
  echo "::error title=bench gate::$2"
  exit "$1"
}

case "${GATE_INCONCLUSIVE:-fail}" in
  fail | warn) ;;
  *) fail 2 "The input 'inconclusive' is neither 'fail' nor 'warn'." ;;
esac

folder=${GATE_FOLDER:?}
summary=${GITHUB_STEP_SUMMARY:-/dev/null}
output=${GITHUB_OUTPUT:-/dev/null}
mkdir -p "$folder"
rm -f "$folder"/{gate.json,gate.log,gate.xml,gate.html,summary.md}

exists() { git cat-file -e "$1^{commit}" 2>/dev/null; }

fetch() {  # one commit or branch that the checkout left out
  local depth=()
  if [[ $(git rev-parse --is-shallow-repository) == true ]]; then depth=(--depth=1); fi
  git fetch --quiet --no-tags "${depth[@]}" origin -- "$1"
}

# Which revision is the base. Without an input: actions/checkout checks out the merge of the pull
# request into its base, whose first parent is that base. The event's base.sha may be older.
base=${GATE_BASE:-}
if [[ -z $base ]]; then
  # Read from the commit itself, because a shallow checkout hides the parents.
  mapfile -t parents < <(git cat-file -p HEAD | sed -n '/^$/q; s/^parent //p')
  if [[ ${#parents[@]} -eq 2 && ${parents[1]} == "${GATE_PULL_HEAD:-}" ]]; then
    base=${parents[0]}
  elif [[ -n ${GATE_PULL_BASE:-} ]]; then
    base=$(git merge-base "$GATE_PULL_BASE" HEAD) ||
      fail 2 "Where the branch left its base cannot be told. Give actions/checkout fetch-depth: 0."
  else
    fail 2 "This is no pull request and there is no input 'base'. Name the revision to compare with."
  fi
fi
if ! exists "$base"; then
  if fetch "$base"; then
    exists "$base" || base=$(git rev-parse FETCH_HEAD)
  else
    echo "::warning title=bench gate::The base could not be fetched. With persist-credentials:" \
      "false and a private repository, give actions/checkout fetch-depth: 0."
  fi
fi

arguments=("--base=$base" "-o" "$folder/gate.json")
if [[ -n ${GATE_HEAD:-} ]]; then arguments+=("--head=$GATE_HEAD"); fi
if [[ -n ${GATE_MARGIN:-} ]]; then arguments+=("--margin=$GATE_MARGIN"); fi
if [[ -n ${GATE_CONFIG:-} ]]; then arguments+=("--config=$GATE_CONFIG"); fi
if [[ -n ${GATE_BUDGET:-} ]]; then arguments+=("--budget=$GATE_BUDGET"); fi
if [[ -n ${GATE_SUITE:-} ]]; then arguments+=("--" "$GATE_SUITE"); fi

code=0
mmopt bench gate "${arguments[@]}" 2>&1 | tee "$folder/gate.log" || code=$?

# "VERDICT yes" where all that is wrong is an open answer, "VERDICT no" otherwise, or nothing.
read -r verdict open < <(
  python3 - "$folder/gate.json" <<'PYTHON' || true
import json, sys
try:
    with open(sys.argv[1], encoding="utf-8") as file:
        report = json.load(file)
    verdict = report["verdict"]
    rows = [row["verdict"] for row in report["benchmarks"] + report["figures"]]
except FileNotFoundError:
    sys.exit()
except (ValueError, KeyError, TypeError) as error:
    sys.exit(f"gate.json is no gate report: {error!r}")
if verdict in ("PASSED", "IMPROVED", "REGRESSED", "INCONCLUSIVE"):
    known = {"PASSED", "IMPROVED", "INCONCLUSIVE", "NEW"}
    print(verdict, "yes" if verdict == "INCONCLUSIVE" and known.issuperset(rows) else "no")
PYTHON
) || true
{
  echo "verdict=${verdict:-}"
  echo "exit-code=$code"
  echo "folder=$folder"
} >>"$output"

if [[ -n ${verdict:-} ]]; then
  mmopt bench report "$folder/gate.json" --markdown "$folder/summary.md" \
    --junit "$folder/gate.xml" --html "$folder/gate.html" >/dev/null ||
    echo "::warning title=bench gate::The report could not be written. gate.json has everything."
fi
if [[ ! -s $folder/summary.md ]]; then
  {
    echo "**bench gate: ${verdict:-no report}, exit code $code.** The last lines it printed:"
    echo
    tail -n 40 "$folder/gate.log" | sed 's/^/    /' # indented, so that no line ends the block
  } >"$folder/summary.md"
fi
if [[ $code == 3 && ${open:-} == yes && ${GATE_INCONCLUSIVE:-} == warn ]]; then
  printf '\nThe answer stayed open. This workflow lets that pass.\n' \
    >>"$folder/summary.md"
  echo "::warning title=bench gate::INCONCLUSIVE: the answer stayed open, and is let pass."
  code=0
elif [[ $code == 0 && ${verdict:-} != PASSED && ${verdict:-} != IMPROVED ]]; then
  printf '\nThe gate exited 0 and left no report that says the same. That is no pass.\n' \
    >>"$folder/summary.md"
  code=3
fi
head -c 1000000 "$folder/summary.md" >>"$summary" # GitHub takes 1 MiB

case $code in
  0) ;;
  1) fail 1 "REGRESSED: see the summary of this job." ;;
  2) fail 2 "The gate refused its input: see the log above." ;;
  3) fail 3 "The gate could not run or could not decide: see the summary of this job." ;;
  *) fail "$code" "The gate ended with exit code $code: see the log above." ;;
esac
