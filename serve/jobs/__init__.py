"""Fine-tuning jobs: the database that keeps them (`store`), what they are (`jobs`), the thread and
the processes that do them (`runner`), and the check of their files (`validate`).
"""
