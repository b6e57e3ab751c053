"""routes.yaml: what may be written, how it is read, and which routes match an event.

load             reads the files and makes `Rules` of them, or reports every problem; `build` has the three kinds
rule_files       a file and its includes: parsed (`yaml_document`), then checked against the schema (`schema_reader`)
schema           every key with its kind of value (`value_kinds`, `expression_kinds`); `route_checks`, `policy`
advice, lints    warnings about valid rules
watch            when changed files are read again, and what new rules change
route_table      finds the routes that match; `conditions`, `precedence`, `eligibility`, `debounce`, `splits`
event_builder    an event's id, type and key; `batches` splits a request into several events
retry_policy     a route's retry settings
templates        JSON with expressions in it; `request_templates` for paths, queries and forms

Expressions:

expressions      evaluates CEL; `cel_compiler` compiles it, `cel_semantics` corrects what the library gets wrong
event_view       what an expression sees of an event; `json_values` makes JSON of what it yields
cost             the most that an evaluation may cost, before it: from `operations` and the sizes in `passed_values`
functions        what we add to CEL's own functions; `patterns` is RE2
expression_checks    what can work with no event, by the types that `cel_types` knows; `scanner` finds the names
absent_fields, cel_errors    what is said of an expression that fails
"""

import sys
from types import ModuleType

# The package `cel` imports its own command line, which we never call: 25 MB of memory, and 80 ms of each start.
sys.modules.setdefault("cel.cli", ModuleType("cel.cli"))
