"""What operators command, as records of `gateway.control`, and what is in force by them.

records            their formats; `redelivery_records` of redeliveries
state              what they add up to; `resolved_index`: which command has resolved a dead letter
follower           reads them in every process
append             writes them
routing_history    by which rules each event was routed
"""
