"""Write docs/request-presets.md from the presets of requests: `python -m dev.request_presets`."""

from pathlib import Path

from gateway.rules.request_presets import REQUEST_PRESETS
from gateway.rules.request_presets.preset import Field, RequestPreset

DOCUMENT = Path(__file__).parent.parent / "docs" / "request-presets.md"
HEAD = """# Request presets: messages for services

<!-- Written by `python -m dev.request_presets` from gateway/rules/request_presets/: change those. -->

With `preset`, a route's `request` has the form that a service expects, of a few fields:

```yaml
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${GITHUB_SECRET}"]}}
destinations:
  chat: {url: "${SLACK_WEBHOOK:-https://hooks.slack.com/services/T0/B0/x}", rate: 1/s}
  on-call: {url: https://events.pagerduty.com/v2/enqueue, rate: 5/s}
routes:
  - name: tell-the-team
    from: github
    match: {type: push}
    to: chat
    request:
      preset: slack
      title: "Push to ${{ body.repository.full_name }}"
      text:
        for: body.commits
        as: commit
        do: "• <${{ commit.url }}|${{ commit.id.substring(0, 7) }}> ${{ commit.message }}"
        join: "\\n"
      facts: {Branch: "${{ body.ref }}", By: "${{ body.pusher.name }}"}
      url: "${{ body.compare }}"
      button: Compare
  - name: wake-somebody
    from: github
    match: {type: workflow_run, body.workflow_run.head_branch: main, body.action: completed}
    to: on-call
    request:
      preset: pagerduty
      routing_key: "${PAGERDUTY_KEY}"
      action: "${{ body.workflow_run.conclusion == 'success' ? 'resolve' : 'trigger' }}"
      dedup_key: "${{ body.repository.full_name }} main"
      summary: "${{ body.repository.full_name }}: ${{ body.workflow_run.name }} has failed"
      severity: warning
      url: "${{ body.workflow_run.html_url }}"
```

What you write in a field may have the service's markup; what comes of the event has none: it is escaped as the service
documents it, so that a commit's message mentions nobody, begins no link and ends none, and adds no header, address or
parameter. (Of Slack's markup, `*bold*` and its like can't be escaped.) Where you write a link around it, as in
`<${{ body.url }}|open>`, it has to be a web address. Control characters are left out, and so is what isn't seen and
hides or turns what is around it: all that sets the direction of a text (Unicode's Bidi_Control), blanks without a
width, soft hyphens, invisible fillers and operators, tags, and the variation selectors of ideographs. Kept are the
joiners U+200C and U+200D, and the selectors U+FE00 to U+FE0F and Mongolian's, which emoji and some scripts need; so a
flag of a part of a country, which consists of tags, is a black one. A text is cut, with `…`, where the service's limit
is, and facts that are too many are left out; what names something, such as a `dedup_key`, is never cut. What the
service would refuse isn't sent: the delivery is a dead letter, `expression_error`, which says what was expected.
`headers` may be added to each; `gateway explain` shows the whole request.
"""


def document() -> str:
    """Return the whole document."""
    return "\n".join([HEAD, *map(_section, REQUEST_PRESETS.values())]) + "\n"


def _section(preset: RequestPreset) -> str:
    about = f"{preset.about} The destination's `url`: {preset.url}. See [its documentation]({preset.source})."
    rows = [f"| `{each.name}`{', required' if each.is_required else ''} | {_about(each)} |" for each in preset.fields]
    return "\n".join([f"\n## {preset.name}\n", about, "", "| field | |", "|---|---|", *rows])


def _about(field: Field) -> str:
    text = field.about.replace("|", "\\|")
    return text if field.limit is None else f"{text} At most {field.limit:,} characters."


if __name__ == "__main__":
    DOCUMENT.write_text(document())
