"""`peftlab report`: what a set of runs says, as tables and as one page that needs no server.

It reads files (result.json, config.yaml, rows.jsonl, optimization_results.yaml, or W&B's offline
records) and never runs or imports anything that they name; torch is never imported either.
"""
