"""The HTTP API at the admin address: what operators and their programs see and do, as JSON.

application                         aiohttp's side: who asks, for what, and the answer or the problem
endpoints                           the table of all (`command_endpoints` and `state_endpoints` are parts of it): of it
                                    are made the routes, the check of roles, and the OpenAPI document (`openapi`)
events, deliveries, dead_letters, names, traffic, findings, audit …    functions that return `shapes`
acts                                functions that give commands; `command_states` what has come of them
explaining, tail, rule_files        what a request would do; new events as they come; the rule files
backend                             what all of them work on: log, rules, index
visibility, shares, cache           who sees what; what one principal may take of what all share; read once for all
json_shapes                         JSON, and its schema, from dataclasses
"""
