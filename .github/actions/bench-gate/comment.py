"""Keep one comment on the pull request equal to the gate's summary. Standard library only.

Reads GATE_NAME, GATE_SUMMARY, GATE_TOKEN and GitHub's own variables. Where writing is not permitted
(a pull request from a fork) or this is no pull request, it says so and exits 0: the comment is a
courtesy, and the gate's verdict stands without it.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

LONGEST = 60_000  # characters; GitHub refuses a comment above 65,536


def main() -> int:
    with open(os.environ["GITHUB_EVENT_PATH"], encoding="utf-8") as file:
        number = json.load(file).get("pull_request", {}).get("number")
    if number is None:
        return _say("this is no pull request, so there is nothing to comment on.")
    # Hidden in the rendered comment; finds the same comment the next time.
    marker = f"<!-- mmopt bench gate: {os.environ['GATE_NAME']} -->"
    text = Path(os.environ["GATE_SUMMARY"]).read_text(encoding="utf-8")
    if len(text) > LONGEST:
        text = text[:LONGEST] + "\n\n(cut here; the artifact has all of it)"
    repository = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}"
    try:
        known = _find(f"{repository}/issues/{number}/comments", marker)
        body = {"body": f"{marker}\n{text}"}
        if known is None:
            _call("POST", f"{repository}/issues/{number}/comments", body)
        else:
            _call("PATCH", f"{repository}/issues/comments/{known}", body)
    except urllib.error.HTTPError as error:
        return _say(f"GitHub answered {error.code}; `pull-requests: write` is needed.")
    except OSError as error:
        return _say(f"GitHub could not be reached: {error}.")
    return 0


def _find(url: str, marker: str) -> int | None:
    """The bot's comment that starts with the marker; one that a person wrote is not taken over."""
    page = 1
    while comments := _call("GET", f"{url}?per_page=100&page={page}"):
        for comment in comments:
            if comment["user"]["type"] == "Bot" and comment["body"].startswith(marker):
                return int(comment["id"])
        page += 1
    return None


def _call(method: str, url: str, body: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {os.environ['GATE_TOKEN']}",
            "Accept": "application/vnd.github+json",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _say(why: str) -> int:
    print(f"::warning title=bench gate::No comment: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
