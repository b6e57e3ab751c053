"""The work behind operators' commands, and the admin address; `gateway.commands` parses their arguments.

control_client, redeliveries, replays, recovery, keyed_requests    commands, given and followed
status, own_status, process_status, findings …           what is wrong, waits, or is paused
log_search, dead_letters, waiting_records, replay_counts …    queries of the log
rejected, rejected_retry            requests that were refused, verified again
trigger, send                       requests made of `fixtures/`, and signed
explain, event_test                 what the rules do with a request; an event as a test of them
shown_rules, rule_diff, rule_format, starter, unseen_fields …    rule files
api_client                          the API of another process, for commands; `api_answers`, `api_commands` … make of
                                    its answers what the log would have said
audit, redaction                    who has done what; what people may not see
live_list                           what a live list of deliveries shows; `live_display` draws it
presentation, dead_letter_presentation, kick_report …    how results look
verification, secret_expiry …       how sources are verified
migrate                             an embedded log moved to Kafka
admin                               the admin address
"""
