"""Fine-tuning jobs.

Read `store` (the database), `jobs` (the state of a job), `runner` (the thread and the processes
that run jobs), `process` (a job's process), `progress` (events and checkpoints of a training run)
and `validate` (the check of a job's files).
"""
