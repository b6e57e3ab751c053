"""Messages in the form that services expect: `request: {preset: slack, …}`.

Each preset is a list of fields and a function from their values to a request. What a rule's author writes may have the
service's markup; what an event has never does: it is escaped as the service's documentation says, before it gets into a
field. Texts are cut where the service's limit is.
"""

from collections.abc import Mapping

from gateway.rules.request_presets.alerts import GRAFANA_ANNOTATION, OPSGENIE, PAGERDUTY
from gateway.rules.request_presets.builds import GITHUB_DISPATCH, GITLAB_TRIGGER, JENKINS
from gateway.rules.request_presets.chat import DISCORD, GOOGLE_CHAT, SLACK, TEAMS
from gateway.rules.request_presets.email import EMAIL_API
from gateway.rules.request_presets.preset import RequestPreset

REQUEST_PRESETS: Mapping[str, RequestPreset] = {
    preset.name: preset
    for preset in (
        *(SLACK, TEAMS, DISCORD, GOOGLE_CHAT),
        *(PAGERDUTY, OPSGENIE, GRAFANA_ANNOTATION),
        *(GITHUB_DISPATCH, GITLAB_TRIGGER, JENKINS),
        EMAIL_API,
    )
}
