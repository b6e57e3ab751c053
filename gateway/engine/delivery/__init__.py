"""Deliveries: when each is attempted, and what follows from the result.

dispatcher           puts a delivery into its lane, and acts on the results of its attempts
destination_lanes    a destination's queue, concurrency and pace; `queues` has all lanes, and what waits until a time
attempts             one attempt: made, measured, traced, and recorded by `attempt_log`
retry_decision       what follows from a result; `breaker` whether another attempt is worth it
holds                why a destination gets nothing for now; `gone_destinations` pauses those that respond with 410
appends              memory for successors; `outcomes` counts and logs how deliveries end
"""
