"""Which events are duplicates of earlier ones, by their identities.

index     decides, by the entries of one partition
store     keeps these in `gateway.dedupe`, for the next owner
filter    does both for all partitions of a member
"""
