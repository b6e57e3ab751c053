"""What the one owner of the jobs does: resume, kick, replay, and resolve dead letters.

runner                  starts what is commanded, in the process that owns the jobs
resume, kick, replay, redeliver, resolve_dead_letters    a job each
scan, log_reader        read the log for a job; `injector` puts deliveries into the shortest tier
replay_matcher          which events a replay is of; `undelivered` and `let_through`: what has become of them before
replay_progress, job_progress    how far a job is
redelivery_plan         which deliveries a redelivery is of
kick_outcomes           what has become of what a kick expedited
backlog_counts          counts open dead letters and parked deliveries
"""
