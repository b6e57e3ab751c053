"""Messages in the formats of services: `request: {preset: slack, …}`.

Each preset is a list of fields, and a function from their values to a request. Literal text in the rules may contain
the service's markup. Values from an event are escaped as the service documents, before they get into a field. Texts are
truncated to the service's limits.
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
