"""From a file of records to batches of tokens.

``formats`` and ``records`` read and validate and need no torch; the service imports them.
``prompts``, ``masking``, ``tokenise``, ``dataset``, ``batching`` and ``collate`` run inside a job.
"""
